"""Do the streams of a trunk separate in training? Pure ops, a few optimizer steps."""

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
WIDTH, SITES, STREAMS = 16, 4, 4


def _spread_after_training(uniform: bool, constraint: str = "sinkhorn") -> tuple[float, set[str]]:
    """Train a pre-norm trunk for 5 steps.

    Returns:
        ``norm(X - mean X) / norm(X)`` of the last state, and the parameters of the second site that
        had a gradient by then.
    """
    torch.manual_seed(0)
    spec = SiteSpec(streams=STREAMS, constraint=constraint)
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) / 4 for _ in range(SITES)]
    sites = []
    for index in range(SITES):
        parameters = initial_parameters(spec, WIDTH, index=index)
        if uniform:
            parameters["bias"][:STREAMS] = torch.logit(torch.tensor(1 / STREAMS))
        sites.append({name: t.double().requires_grad_() for name, t in parameters.items()})
    leaves = [t for site in sites for t in site.values()]
    optimizer = torch.optim.Adam([*leaves, *[w.requires_grad_() for w in weights]], lr=1e-2)
    x, target = torch.randn(2, 32, WIDTH, dtype=torch.float64)

    alive: set[str] = set()
    for _ in range(5):
        X = OPS.expand(x, STREAMS, -1)
        for site, weight in zip(sites, weights, strict=True):
            args = (site["phi"], site["bias"], site["alpha"], spec.encode())
            u, h_post, h_res, _ = OPS.pre(X, *args)
            f = torch.tanh(F.rms_norm(u, (WIDTH,)) @ weight)
            X = OPS.post(X, f, h_post, h_res, spec.encode())
        loss = (OPS.collapse(X, None, None, None, "mean", spec.encode()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradient = sites[1]["bias"].grad
        assert gradient is not None
        alive |= {"res"} if gradient[2 * STREAMS :].abs().max() > 1e-12 else set()
        alive |= {n for n in ("phi", "alpha") if sites[1][n].grad.abs().max() > 1e-12}
        optimizer.step()
    spread = (X - X.mean(-2, keepdim=True)).norm() / X.norm()
    return spread.item(), alive


@pytest.mark.parametrize("constraint_name", ["sinkhorn", "permutations", "kronecker", "none"])
def test_preserving_start_lets_the_streams_separate(constraint_name: str) -> None:
    spread, alive = _spread_after_training(uniform=False, constraint=constraint_name)
    assert spread > 1e-4
    assert alive == {"res", "phi", "alpha"}


def test_uniform_pre_mix_is_a_trap_the_streams_never_leave() -> None:
    spread, alive = _spread_after_training(uniform=True)
    assert spread < 1e-12
    assert "res" not in alive
