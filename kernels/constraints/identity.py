"""Identity: streams are never mixed, only read and written (iHC)."""

from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.base import Constraint
from mhc_compile.kernels.spec import SiteSpec


class Identity(Constraint):
    """``H_res = I`` for every token; there are no logits."""

    name: ClassVar[str] = "identity"
    mixes: ClassVar[bool] = False

    def logits(self, streams: int) -> int:
        """None."""
        return 0

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        n = spec.streams
        eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
        return eye.expand(*logits.shape[:-1], n, n)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """An empty gradient for the empty logits."""
        return torch.zeros_like(logits)

    def cpp(self, spec: SiteSpec) -> str:
        """Nothing to compute; see `Constraint.cpp`."""
        return (
            "// H_res = I.\n"
            "INLINE void matrix(const vec*, vec*) {}\n"
            "INLINE void matrix_backward(const vec*, const vec*, vec*) {}\n"
        )

    def triton(self, spec: SiteSpec) -> str:
        """Nothing to compute; see `Constraint.triton`."""
        return "# H_res = I.\n"

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """Empty."""
        return torch.empty(0, dtype=torch.float64)
