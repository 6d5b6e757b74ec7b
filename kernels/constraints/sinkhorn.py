"""Sinkhorn: approximately doubly stochastic matrices, arXiv 2512.24880 equation (19)."""

from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.base import Constraint, softmax_backward
from mhc_compile.kernels.constraints.sinkhorn_cpp import sinkhorn_cpp
from mhc_compile.kernels.constraints.sinkhorn_triton import sinkhorn_triton
from mhc_compile.kernels.spec import SiteSpec

# Iterates are [out, in, tokens]: tokens innermost make every step a few long vector operations.
_COLUMN, _ROW = 0, 1  # the axis that a column sum, and a row sum, runs over


class Sinkhorn(Constraint):
    """``M = exp(h)``, then ``iters`` times divide columns by their sums, then rows by theirs.

    The first column step is written as a softmax, which is the same number without overflow. With
    ``sinkhorn_eps`` every later divisor is ``sum + eps``. Rows come last, so they sum to 1 for any
    logits (without eps); columns do as far as the iteration has converged.
    """

    name: ClassVar[str] = "sinkhorn"
    start_eps: ClassVar[bool] = False
    """Whether eps is also added to the matrix after the first column step."""

    def logits(self, streams: int) -> int:
        """One logit per entry, row-major [out, in]."""
        return streams * streams

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        h = _tokens_last(logits, spec.streams)
        matrix = self._first_iteration(h, spec)[-1]
        for axis in (_COLUMN, _ROW) * (spec.iters - 1):
            matrix = matrix / (matrix.sum(axis, keepdim=True) + spec.sinkhorn_eps)
        return _tokens_first(matrix).reshape(*logits.shape[:-1], spec.streams, spec.streams)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """Gradient of the same ``iters`` iterations (not of their limit), replayed in reverse."""
        eps = spec.sinkhorn_eps
        h = _tokens_last(logits, spec.streams)
        start, divisor, matrix = self._first_iteration(h, spec)
        first_row = matrix
        trace = []
        for axis in (_COLUMN, _ROW) * (spec.iters - 1):
            sums = matrix.sum(axis, keepdim=True) + eps
            matrix = matrix / sums
            trace.append((matrix, sums, axis))

        g = _tokens_last(grad.flatten(-2), spec.streams)
        # y = x / (sum(x) + eps), hence gx = (gy - sum(gy y)) / (sum(x) + eps).
        for matrix, sums, axis in reversed(trace):
            g = (g - (g * matrix).sum(axis, keepdim=True)) / sums
        if eps == 0.0:
            g = softmax_backward(g, first_row, _ROW)
            g = g - start * g.sum(_COLUMN, keepdim=True)
        else:
            g = (g - (g * first_row).sum(_ROW, keepdim=True)) / divisor
            g = softmax_backward(g, start, _COLUMN)
        return _tokens_first(g).reshape(logits.shape)

    def cpp(self, spec: SiteSpec) -> str:
        """The same steps; see `Constraint.cpp`."""
        return sinkhorn_cpp(spec, self.start_eps)

    def triton(self, spec: SiteSpec) -> str:
        """The same steps; see `Constraint.triton`."""
        return sinkhorn_triton(spec, self.start_eps)

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """``2 I`` (at n=4 a diagonal of 0.711), or A.6: 3 on the diagonal, -3 elsewhere."""
        eye = torch.eye(streams, dtype=torch.float64)
        return (6.0 * eye - 3.0 if init == "paper" else 2.0 * eye).flatten()

    def _first_iteration(
        self, h: torch.Tensor, spec: SiteSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first column and row step.

        Returns:
            The column softmax, the row divisor and the matrix after both steps.
        """
        eps = spec.sinkhorn_eps
        if eps == 0.0:
            # A row far below its columns' maxima underflows to 0 / 0 unless this step is taken on
            # logarithms. Later steps cannot: from here on every sum is at least 1 / n^2.
            log_start = h.log_softmax(_COLUMN)
            start = log_start.exp()
            return start, start.sum(_ROW, keepdim=True), log_start.softmax(_ROW)
        start = h.softmax(_COLUMN)
        matrix = start + eps if self.start_eps else start
        divisor = matrix.sum(_ROW, keepdim=True) + eps
        return start, divisor, matrix / divisor


def _tokens_last(logits: torch.Tensor, streams: int) -> torch.Tensor:
    return logits.reshape(-1, streams, streams).permute(1, 2, 0).contiguous()


def _tokens_first(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.permute(2, 0, 1).contiguous()
