"""No constraint: hyper-connections as first published, arXiv 2409.19606."""

from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.base import Constraint, Gate
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import function, numbered, pack


class Unconstrained(Constraint):
    """``H_res = alpha tanh(z / r) + bias`` entry by entry, from streams normed one by one.

    That paper writes the mixing transposed, ``A_r[in, out]``.
    """

    name: ClassVar[str] = "none"
    doubly_stochastic: ClassVar[bool] = False
    gate: ClassVar[Gate] = "tanh"
    per_stream: ClassVar[bool] = True

    def logits(self, streams: int) -> int:
        """One number per entry, row-major [out, in]."""
        return streams * streams

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        return logits.reshape(*logits.shape[:-1], spec.streams, spec.streams)

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """The gradient, flattened."""
        return grad.flatten(-2)

    def cpp(self, spec: SiteSpec) -> str:
        """Entry by entry; see `Constraint.cpp`."""
        entries = spec.streams * spec.streams
        copy = f"for (int i = 0; i < {entries}; ++i)"
        return (
            "// H_res = h.\n"
            f"INLINE void matrix(const vec* h, vec* out) {{ {copy} out[i] = h[i]; }}\n"
            "INLINE void matrix_backward(const vec* g, const vec*, vec* dh) {\n"
            f"  {copy} dh[i] = g[i];\n"
            "}\n"
        )

    def triton(self, spec: SiteSpec) -> str:
        """Entry by entry; see `Constraint.triton`."""
        h, g = (numbered(name, spec.streams * spec.streams) for name in "hg")
        functions = (
            function("matrix", h, "H_res[i, j] = h[i n + j].", pack("return", h)),
            function("matrix_backward", [*g, *h], "The same entries.", pack("return", g)),
        )
        return "\n\n".join(functions)

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """The identity, for either ``init``."""
        return torch.eye(streams, dtype=torch.float64).flatten()
