"""The Triton lines of every constraint, against its torch formula in float64."""

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_of
from mhc_compile.kernels.spec import EPS_PLACES, SiteSpec
from mhc_compile.kernels.triton import launch
from mhc_compile.kernels.triton.emit_matrix import TILE, matrix_source
from mhc_compile.kernels.triton.load import load

pytestmark = pytest.mark.interpreted

TOKENS = 20  # a part of a block
MIXING = [name for name, kind in CONSTRAINTS.items() if kind.mixes]
SPECS = [
    SiteSpec(streams=n, constraint=name, iters=20 if n < 6 else 6)
    for name in MIXING
    for n in (1, 2, 3, 4, 6, 8)
    if not (name == "sinkhorn_softmax" and n > 2)  # the others follow
    and not (name == "permutations" and n > 4)
    and not (name == "kronecker" and n & (n - 1))
] + [
    SiteSpec(streams=4, constraint=name, iters=iters, sinkhorn_eps=eps)
    for name in ("sinkhorn", "sinkhorn_softmax")
    for iters, eps in ((1, 0.0), (1, 2e-3), (2, 0.0), (5, 2e-3), (20, 2e-3), (30, 0.0))
]  # fmt: skip


def _run(spec: SiteSpec, logits: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """H_res and the gradient of the logits, by the generated kernels."""
    module, tokens, n = load(matrix_source(spec)), len(logits), spec.streams
    matrix = torch.full((tokens, n, n), float("nan"), dtype=logits.dtype)
    back = torch.full_like(logits, float("nan"))
    grid = (-(-tokens // TILE.constants["BT"]),)
    module.make_matrix[grid](logits, matrix, tokens, **TILE.constants)
    module.make_matrix_backward[grid](grad, logits, back, tokens, **TILE.constants)
    return [matrix, back]


def _exact(spec: SiteSpec, logits: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    kind, wide = constraint_of(spec), logits.double()
    return [kind.matrix(wide, spec), kind.matrix_backward(grad.double(), wide, spec)]


def _inputs(spec: SiteSpec, std: float, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    n = spec.streams
    return torch.randn(tokens, constraint_of(spec).logits(n)) * std, torch.randn(tokens, n, n)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm()) if exact.any() else 0.0


@pytest.mark.parametrize("spec", SPECS, ids=SiteSpec.encode)
def test_matrix_and_gradient_follow_float64(spec: SiteSpec) -> None:
    inputs = _inputs(spec, 1.0)
    for found, exact in zip(_run(spec, *inputs), _exact(spec, *inputs), strict=True):
        assert _error(found, exact) < 1e-6


@pytest.mark.parametrize("name", MIXING)
def test_sharp_logits_follow_float64(name: str) -> None:
    spec = SiteSpec(streams=4, constraint=name, sinkhorn_eps=CONSTRAINTS[name].default_eps)
    logits, grad = _inputs(spec, 1.0, tokens=190)  # three programs
    stds = [1.0, 4.0, 8.0, 16.0] if name == "sinkhorn_exp" else [1.0, 4.0, 8.0, 16.0, 30.0]
    scales = torch.tensor(stds).repeat(48)[:190]  # at 30 its exp overflows
    inputs = logits * scales[:, None], grad
    for found, exact in zip(_run(spec, *inputs), _exact(spec, *inputs), strict=True):
        for std in scales.unique():
            assert _error(found[scales == std], exact[scales == std]) < 1e-5


@pytest.mark.parametrize("iters", [1, 5, 20])
@pytest.mark.parametrize("place", EPS_PLACES)
def test_every_place_of_eps_follows_float64(place: str, iters: int) -> None:
    spec = SiteSpec(
        streams=3, constraint="sinkhorn_exp", iters=iters, sinkhorn_eps=0.1, eps_at=place
    )
    logits, grad = _inputs(spec, 3.0)
    logits -= 2.0  # some sums are below eps, so that the floor is felt
    exact = _exact(spec, logits, grad)
    for found, right in zip(_run(spec, logits, grad), exact, strict=True):
        assert _error(found, right) < 2e-6


@pytest.mark.parametrize("place", EPS_PLACES)
@pytest.mark.parametrize("logit", [100.0, torch.nan])
def test_logits_that_overflow_show_and_stay_with_their_token(logit: float, place: str) -> None:
    spec = SiteSpec(streams=3, constraint="sinkhorn_exp", iters=5, sinkhorn_eps=1e-3, eps_at=place)
    logits, grad = _inputs(spec, 1.0, tokens=3)
    logits[1, 4] = logit
    for found in _run(spec, logits, grad):
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", [name for name in MIXING if name != "sinkhorn_exp"])
def test_equal_logits_give_finite_results(name: str) -> None:
    spec = SiteSpec(streams=4, constraint=name)
    logits, grad = _inputs(spec, 1.0, tokens=4)
    equal = torch.tensor([0.0, 3.0, -1e4, 1e4])[:, None].expand_as(logits).contiguous()
    assert all(found.isfinite().all() for found in _run(spec, equal, grad))


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_softmax", "permutations", "kronecker"])
def test_huge_logits_give_rows_of_one(name: str) -> None:
    spec = SiteSpec(streams=4, constraint=name)
    matrix, back = _run(spec, *_inputs(spec, 1e4, tokens=60))
    assert back.isfinite().all()
    assert (matrix.sum(-1) - 1).abs().max() < 1.5e-6


def test_a_row_that_underflows_stays_a_row_of_one() -> None:
    logits = torch.zeros(1, 16)
    logits[:, 8:12] = -500.0
    matrix, back = _run(SiteSpec(streams=4), logits, torch.randn(1, 4, 4))
    torch.testing.assert_close(matrix, torch.full((1, 4, 4), 0.25))
    assert back.isfinite().all()


def test_a_logit_that_is_not_a_number_shows() -> None:
    logits = torch.randn(2, 16)
    logits[0, 5] = float("nan")
    matrix, back = _run(SiteSpec(streams=4), logits, torch.randn(2, 4, 4))
    assert matrix[0].isnan().any()
    assert back[0].isnan().any()
    assert matrix[1].isfinite().all()


def test_half_precision_logits_are_computed_in_float32_and_rounded_once() -> None:
    spec = SiteSpec(streams=4)
    inputs = [tensor.bfloat16() for tensor in _inputs(spec, 1.0)]
    for found, exact in zip(_run(spec, *inputs), _exact(spec, *inputs), strict=True):
        assert found.dtype == torch.bfloat16
        assert _error(found, exact) <= 1.01 * _error(exact.bfloat16(), exact)


def test_the_op_of_any_shape_and_strides_follows_float64() -> None:
    spec = SiteSpec(streams=3, iters=4)
    logits, grad = torch.randn(2, 4, 5, 3, 6)[..., ::2].transpose(1, 2).unbind(0)
    wide = logits.double().requires_grad_()
    exact = torch.ops.mhc.sinkhorn(wide, f"{spec.encode()} kernels=reference")
    (exact_back,) = torch.autograd.grad(exact, wide, grad.double())
    matrix = launch.sinkhorn(logits, spec)
    assert matrix.shape == (5, 4, 3, 3)
    assert _error(matrix, exact.detach()) < 1e-6
    assert _error(launch.sinkhorn_backward(grad, logits, spec), exact_back) < 1e-6
    assert launch.sinkhorn(torch.empty(0, 3, 3), spec).shape == (0, 3, 3)
