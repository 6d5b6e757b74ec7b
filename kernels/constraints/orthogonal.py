"""Orthogonal: rotations of the streams through the Cayley transform."""

from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.base import Constraint
from mhc_compile.kernels.spec import SiteSpec


class Orthogonal(Constraint):
    """``H_res = (I - A)(I + A)^-1`` with A skew-symmetric: exact, no iteration.

    Norm-preserving but not stochastic: rows sum to 1 at the identity it starts from, and need not
    afterwards.

    Reference:
        JPmHC, arXiv 2602.18308, which takes fixed-point steps towards the same transform.
    """

    name: ClassVar[str] = "orthogonal"
    doubly_stochastic: ClassVar[bool] = False

    def logits(self, streams: int) -> int:
        """The strict upper triangle of A, row by row."""
        return streams * (streams - 1) // 2

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        inverse = _inverse(logits, spec.streams)
        return 2.0 * inverse - _eye(spec.streams, logits)  # I - A = 2 I - (I + A)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """``dH = -2 B dA B`` with ``B = (I + A)^-1``; see `Constraint.matrix_backward`."""
        inverse_t = _inverse(logits, spec.streams).mT
        grad_a = -2.0 * (inverse_t @ grad @ inverse_t)
        row, column = _upper(spec.streams, logits.device)
        return grad_a[..., row, column] - grad_a[..., column, row]

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """Zero, the identity, for either ``init``; the Jacobian there is -2, not 0."""
        return torch.zeros(self.logits(streams), dtype=torch.float64)


def _upper(streams: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    row, column = torch.triu_indices(streams, streams, 1, device=device)
    return row, column


def _eye(streams: int, like: torch.Tensor) -> torch.Tensor:
    return torch.eye(streams, dtype=like.dtype, device=like.device)


def _inverse(logits: torch.Tensor, streams: int) -> torch.Tensor:
    """``(I + A)^-1``. It always exists: the eigenvalues of a skew matrix are imaginary."""
    upper = logits.new_zeros(*logits.shape[:-1], streams, streams)
    row, column = _upper(streams, logits.device)
    upper[..., row, column] = logits
    inverse: torch.Tensor = torch.linalg.inv(_eye(streams, logits) + upper - upper.mT)
    return inverse
