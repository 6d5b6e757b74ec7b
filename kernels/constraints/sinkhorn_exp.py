"""Sinkhorn as most hand-written code has it: from ``exp``, with an eps in every division."""

from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.sinkhorn import (
    COLUMN,
    ROW,
    Sinkhorn,
    tokens_first,
    tokens_last,
)
from mhc_compile.kernels.constraints.sinkhorn_exp_cpp import sinkhorn_exp_cpp
from mhc_compile.kernels.constraints.sinkhorn_exp_triton import sinkhorn_exp_triton
from mhc_compile.kernels.spec import SiteSpec


class SinkhornExp(Sinkhorn):
    """``M = exp(h)``, then ``iters`` times columns and rows; ``eps_at`` says where eps stands.

    Unlike in "sinkhorn", the first column step has its eps too, so nothing is taken out of the
    exponent: logits that overflow do so here, as in the code this stands for.
    """

    name: ClassVar[str] = "sinkhorn_exp"
    default_eps: ClassVar[float] = 1e-8

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        matrix = tokens_last(logits, spec.streams).exp()
        for axis in (COLUMN, ROW) * spec.iters:
            matrix = _step(matrix, axis, spec)[0]
        return tokens_first(matrix).reshape(*logits.shape[:-1], spec.streams, spec.streams)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """Gradient of the same ``iters`` iterations, replayed in reverse."""
        start = tokens_last(logits, spec.streams).exp()
        matrix, trace = start, []
        for axis in (COLUMN, ROW) * spec.iters:
            matrix, divisor, moves = _step(matrix, axis, spec)
            trace.append((matrix, divisor, moves, axis))
        g = tokens_last(grad.flatten(-2), spec.streams)
        # y = (x + a) / d(sum x), hence gx = (gy - d' sum(gy y)) / d.
        for matrix, divisor, moves, axis in reversed(trace):
            through = (g * matrix).sum(axis, keepdim=True)
            g = (g - (through if moves is None else through * moves)) / divisor
        return tokens_first(g * start).reshape(logits.shape)

    def cpp(self, spec: SiteSpec) -> str:
        """The same steps; see `Constraint.cpp`."""
        return sinkhorn_exp_cpp(spec)

    def triton(self, spec: SiteSpec) -> str:
        """The same steps; see `Constraint.triton`."""
        return sinkhorn_exp_triton(spec)


def _step(
    matrix: torch.Tensor, axis: int, spec: SiteSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The matrix after one step, its divisor, and where the divisor follows the sum (None: yes)."""
    eps, place = spec.sinkhorn_eps, spec.eps_at
    entries = matrix + eps if place in ("entries", "both") else matrix
    total = (entries if place == "entries" else matrix).sum(axis, keepdim=True)
    if place == "floor":
        return entries / total.clamp_min(eps), total.clamp_min(eps), (total >= eps).to(total.dtype)
    divisor = total if place == "entries" else total + eps
    return entries / divisor, divisor, None
