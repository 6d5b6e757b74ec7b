"""Sinkhorn from ``exp`` with eps in every division, in each place that eps can have."""

from collections.abc import Callable

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import EPS_PLACES, SiteSpec

EPS = 0.1
FORMULAS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "divisor": lambda m, axis: m / (m.sum(axis, keepdim=True) + EPS),
    "entries": lambda m, axis: (m + EPS) / (m + EPS).sum(axis, keepdim=True),
    "both": lambda m, axis: (m + EPS) / (m.sum(axis, keepdim=True) + EPS),
    "floor": lambda m, axis: m / m.sum(axis, keepdim=True).clamp_min(EPS),
}


def _formula(logits: torch.Tensor, place: str, iters: int) -> torch.Tensor:
    matrix = logits.exp()
    for axis in (-2, -1) * iters:
        matrix = FORMULAS[place](matrix, axis)
    return matrix


def _spec(place: str, n: int = 3) -> SiteSpec:
    return SiteSpec(streams=n, constraint="sinkhorn_exp", iters=4, sinkhorn_eps=EPS, eps_at=place)


@pytest.mark.parametrize("place", EPS_PLACES)
def test_op_and_gradient_follow_the_formula(place: str) -> None:
    torch.manual_seed(0)
    # Some columns sum to less than eps, so that the floor is felt.
    logits = (torch.randn(5, 3, 3, dtype=torch.float64) * 3 - 2).requires_grad_()
    right = _formula(logits, place, 4)
    mine = torch.ops.mhc.sinkhorn(logits, _spec(place).encode())
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(right)
    (right_gradient,) = torch.autograd.grad((right * weight).sum(), logits)
    (my_gradient,) = torch.autograd.grad((mine * weight).sum(), logits)
    torch.testing.assert_close(my_gradient, right_gradient, rtol=1e-10, atol=1e-12)


def test_the_place_of_eps_makes_a_difference_and_travels_in_the_text() -> None:
    logits = torch.randn(2, 3, 3, dtype=torch.float64) - 2
    results = []
    for place in EPS_PLACES:
        text = _spec(place).encode()
        assert SiteSpec.decode(text) == _spec(place)
        results.append(torch.ops.mhc.sinkhorn(logits, text))
    for i, one in enumerate(results):
        assert all((one - two).abs().max() > 1e-4 for two in results[:i])


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(KernelError, match="eps_at='nowhere' is not allowed"):
        SiteSpec(streams=2, eps_at="nowhere")
