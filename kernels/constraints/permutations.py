"""Permutations: exactly doubly stochastic as a convex sum of all permutations (mHC-lite)."""

import math
from functools import lru_cache
from itertools import permutations
from typing import ClassVar

import torch
import torch.nn.functional as F

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints.base import Constraint, softmax_backward
from mhc_compile.kernels.constraints.permutations_triton import permutations_triton
from mhc_compile.kernels.cpp.text import function, items, total
from mhc_compile.kernels.spec import SiteSpec

_MAX_STREAMS = 5  # 120 logits per token; 6 streams would need 720


class Permutations(Constraint):
    """``H_res = sum_p softmax(h)_p P_p`` over all n! permutations.

    Reference:
        mHC-lite, arXiv 2601.05732.
    """

    name: ClassVar[str] = "permutations"

    def check(self, streams: int) -> None:
        """Refuse more than 5 streams; see `Constraint.check`."""
        if streams > _MAX_STREAMS:
            raise KernelError(
                f"constraint 'permutations' takes 1 to {_MAX_STREAMS} streams, not {streams}: "
                f"it has one logit for each of the {math.factorial(streams)} permutations. "
                "Use 'sinkhorn', or 'kronecker' for 8 or 16 streams"
            )

    def logits(self, streams: int) -> int:
        """One logit per permutation, the identity first."""
        return math.factorial(streams)

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        mixed = logits.softmax(-1) @ _flat_permutations(spec.streams, logits)
        return mixed.reshape(*logits.shape[:-1], spec.streams, spec.streams)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """Gradient of `matrix`; see `Constraint.matrix_backward`."""
        grad_weights = grad.flatten(-2) @ _flat_permutations(spec.streams, logits).mT
        return softmax_backward(grad_weights, logits.softmax(-1), -1)

    def cpp(self, spec: SiteSpec) -> str:
        """A softmax over the permutations, and each entry a sum of its; see `Constraint.cpp`."""
        n, orders = spec.streams, _orders(spec.streams)
        weights = [
            f"vec w[{len(orders)}], top = h[0], sum = vec{{}};",
            f"for (int p = 1; p < {len(orders)}; ++p) top = max(top, h[p]);",
            f"for (int p = 0; p < {len(orders)}; ++p) sum += w[p] = exp(h[p] - top);",
            f"for (int p = 0; p < {len(orders)}; ++p) w[p] /= sum;",
        ]
        entries = [
            f"out[{i * n + j}] = "
            + total(items("w", (p for p, order in enumerate(orders) if order[i] == j)))
            + ";"
            for i in range(n)
            for j in range(n)
        ]
        back = [
            f"const vec g{p} = "
            + total(items("g", (i * n + j for i, j in enumerate(order))))
            + f"; dot += w[{p}] * g{p};"
            for p, order in enumerate(orders)
        ]
        ends = [f"dh[{p}] = w[{p}] * (g{p} - dot);" for p in range(len(orders))]
        return (
            "// H_res = sum_p softmax(h)_p P_p over all permutations, arXiv 2601.05732.\n"
            + function("matrix(const vec* h, vec* out)", [*weights, *entries])
            + function(
                "matrix_backward(const vec* g, const vec* h, vec* dh)",
                [*weights, "vec dot = {};", *back, *ends],
            )
        )

    def triton(self, spec: SiteSpec) -> str:
        """The same sums; see `Constraint.triton`."""
        return permutations_triton(_orders(spec.streams))

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """The identity weighs as much as all others together, or 3 against -3 as in A.6."""
        high, low = (3.0, -3.0) if init == "paper" else (math.log(math.factorial(streams)), 0.0)
        bias = torch.full((self.logits(streams),), low, dtype=torch.float64)
        bias[0] = high
        return bias


@lru_cache
def _orders(streams: int) -> tuple[tuple[int, ...], ...]:
    return tuple(permutations(range(streams)))


def _flat_permutations(streams: int, like: torch.Tensor) -> torch.Tensor:
    """All permutation matrices, ``[n!, n * n]``, in the dtype and on the device of ``like``."""
    orders = torch.tensor(_orders(streams), device=like.device)
    return F.one_hot(orders, streams).flatten(-2).to(like.dtype)
