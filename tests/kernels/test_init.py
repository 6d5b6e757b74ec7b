import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_named
from mhc_compile.kernels.init import initial_head, initial_parameters
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
WIDTH = 6


def _spec(constraint: str, n: int, dynamic: bool = True) -> SiteSpec:
    eps = constraint_named(constraint).default_eps
    return SiteSpec(
        streams=n, constraint=constraint, dynamic=dynamic, pre_eps=eps, sinkhorn_eps=eps
    )


@pytest.mark.parametrize("dynamic", [True, False])
def test_preserve_reads_writes_and_carries_equal_streams_unchanged(
    constraint: str, n: int, dynamic: bool
) -> None:
    spec = _spec(constraint, n, dynamic)
    if n == 1 and constraint_named(constraint).gate == "sigmoid":
        with pytest.raises(KernelError, match="plain add"):
            initial_parameters(SiteSpec(streams=1, constraint=constraint), WIDTH)
        return
    torch.manual_seed(0)
    x, f = torch.randn(7, WIDTH), torch.randn(7, WIDTH)
    X = OPS.expand(x, n, -1)
    for index in range(n + 1):
        p = initial_parameters(spec, WIDTH, index=index)
        u, h_post, h_res, _ = OPS.pre(X, p.get("phi"), p["bias"], p.get("alpha"), spec.encode())
        out = OPS.post(X, f, h_post, h_res, spec.encode())
        torch.testing.assert_close(u, x, rtol=1e-6, atol=1e-6)
        # Rows fall short of 1 by sinkhorn_eps where the constraint has one.
        torch.testing.assert_close(out, X + f[:, None], rtol=1e-6, atol=5e-6)


def test_preserve_reads_the_streams_unequally_and_rotates_with_the_site() -> None:
    spec = _spec("sinkhorn", 4)
    first = initial_parameters(spec, WIDTH)["bias"][:4].sigmoid()
    torch.testing.assert_close(first, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    for index in range(9):
        weights = initial_parameters(spec, WIDTH, index=index)["bias"][:4].sigmoid()
        torch.testing.assert_close(weights, first.roll(index % 4))


def test_preserve_counts_pre_eps_into_the_sum() -> None:
    spec = SiteSpec(streams=4, constraint="sinkhorn_softmax", pre_eps=0.05, sinkhorn_eps=1e-6)
    weights = initial_parameters(spec, WIDTH)["bias"][:4].sigmoid() + 0.05
    assert weights.sum().item() == pytest.approx(1.0, abs=2e-7)
    head = initial_head(spec, WIDTH)["bias"].sigmoid() + 0.05
    torch.testing.assert_close(head, torch.full((4,), 0.25))


def test_pre_eps_too_large_for_the_weights_is_refused() -> None:
    spec = SiteSpec(streams=4, pre_eps=0.2)
    with pytest.raises(KernelError, match=r"pre_eps=0\.2 .*too large.*Lower pre_eps"):
        initial_parameters(spec, WIDTH)


def test_paper_is_appendix_a6() -> None:
    p = initial_parameters(_spec("sinkhorn", 4), WIDTH, init="paper", index=5)
    assert p["bias"][:4].tolist() == [-3.0, 3.0, -3.0, -3.0]
    assert p["bias"][4:8].tolist() == [0.0] * 4
    assert torch.equal(p["bias"][8:].view(4, 4), 6.0 * torch.eye(4) - 3.0)
    assert p["bias"][:4].sigmoid().sum().item() == pytest.approx(1.0949, abs=1e-4)
    torch.testing.assert_close(p["alpha"], torch.full((3,), 0.01))
    assert p["phi"].shape == (4 * WIDTH, 24)
    assert not p["phi"].any()


def test_unconstrained_paper_start_is_one_hot() -> None:
    p = initial_parameters(_spec("none", 3), WIDTH, init="paper", index=4)
    assert p["bias"].tolist() == [0, 1, 0, 1, 1, 1, *torch.eye(3).flatten().tolist()]
    assert p["phi"].shape == (WIDTH, 5)


@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_parameters_fit_the_op_and_static_sites_have_a_bias_only(
    constraint: str, init: str
) -> None:
    for dynamic in (True, False):
        spec = _spec(constraint, 4, dynamic)
        p = initial_parameters(spec, WIDTH, init=init, index=1)
        assert set(p) == ({"phi", "bias", "alpha"} if dynamic else {"bias"})
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in p.values())
        X = torch.randn(3, 4, WIDTH)
        OPS.pre(X, p.get("phi"), p["bias"], p.get("alpha"), spec.encode())


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_learned_collapse_starts_as_the_mean(dynamic: bool) -> None:
    spec = _spec("sinkhorn_softmax", 4, dynamic)
    head = initial_head(spec, WIDTH)
    X = torch.randn(5, 4, WIDTH)
    out = OPS.collapse(
        X, head.get("phi"), head["bias"], head.get("alpha"), "learned", spec.encode()
    )
    torch.testing.assert_close(out, X.mean(1))


def test_unknown_init_is_refused() -> None:
    with pytest.raises(KernelError, match="'zeros' is not allowed: use one of preserve, paper"):
        initial_parameters(_spec("sinkhorn", 4), WIDTH, init="zeros")
