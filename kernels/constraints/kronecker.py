"""Kronecker: exactly doubly stochastic as a Kronecker product of 2 x 2 factors (KromHC)."""

from typing import ClassVar

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints.base import Constraint, softmax_backward
from mhc_compile.kernels.constraints.kronecker_triton import kronecker_triton
from mhc_compile.kernels.cpp.text import function, total
from mhc_compile.kernels.spec import SiteSpec


class Kronecker(Constraint):
    """``H_res = F_1 x ... x F_K`` with ``F_k = p_k I + (1 - p_k) Swap`` and ``n = 2^K``.

    Such a product depends on ``out XOR in`` alone: ``H_res[i, j] = v[i ^ j]``, where v is the
    Kronecker product of the vectors ``(p_k, 1 - p_k) = softmax(h_k)``.

    Reference:
        KromHC, arXiv 2601.21579.
    """

    name: ClassVar[str] = "kronecker"

    def check(self, streams: int) -> None:
        """Refuse anything but a power of two; see `Constraint.check`."""
        if streams & (streams - 1):
            raise KernelError(
                f"constraint 'kronecker' takes 1, 2, 4, 8 or 16 streams, not {streams}: its matrix "
                "is a product of 2 x 2 factors. Use 'sinkhorn' or, up to 5 streams, 'permutations'"
            )

    def logits(self, streams: int) -> int:
        """Two logits (keep, swap) per factor."""
        return 2 * _factors(streams)

    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res ``[..., n, n]``; see `Constraint.matrix`."""
        weights = _weights(logits, spec.streams)
        return _product(weights)[..., _xor_table(spec.streams, logits.device)]

    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """Gradient of `matrix`; see `Constraint.matrix_backward`."""
        n, factors = spec.streams, _factors(spec.streams)
        weights = _weights(logits, n)
        # The table is symmetric, and its row i lists where v[x] stands in row i: at i ^ x.
        table = _xor_table(n, logits.device)
        grad_v = grad.gather(-1, table.expand(grad.shape)).sum(-2)
        grad_weights = torch.empty_like(weights)
        for k in range(factors):
            others = weights.clone()
            others[..., k, :] = 1.0
            share = grad_v * _product(others)
            by_digit = share.reshape(*share.shape[:-1], 2**k, 2, n >> (k + 1))
            grad_weights[..., k, :] = by_digit.sum((-3, -1))
        return softmax_backward(grad_weights, weights, -1).flatten(-2)

    def cpp(self, spec: SiteSpec) -> str:
        """The vector v by its products, and out by XOR; see `Constraint.cpp`."""
        n, factors = spec.streams, _factors(spec.streams)

        def digits(x: int, skip: int | None = None) -> str:
            """The product that is v[x], without factor ``skip``."""
            kept = [k for k in range(factors) if k != skip]
            return " * ".join(f"w[{k}][{x >> (factors - 1 - k) & 1}]" for k in kept) or "splat(1)"

        weights = [f"vec w[{max(factors, 1)}][2];"]
        for k in range(factors):
            weights.append(f"w[{k}][0] = sigmoid(h[{2 * k}] - h[{2 * k + 1}]);")
            weights.append(f"w[{k}][1] = sigmoid(h[{2 * k + 1}] - h[{2 * k}]);")
        values = [f"const vec v{x} = {digits(x)};" for x in range(n)]
        entries = [f"out[{i * n + j}] = v{i ^ j};" for i in range(n) for j in range(n)]
        sums = [
            f"const vec g{x} = {total(f'g[{i * n + (i ^ x)}]' for i in range(n))};"
            for x in range(n)
        ]
        back = []
        for k in range(factors):
            keep, swap = (
                total(
                    f"g{x} * ({digits(x, k)})"
                    for x in range(n)
                    if x >> (factors - 1 - k) & 1 == digit
                )
                for digit in (0, 1)
            )
            back.append(f"const vec d{k} = w[{k}][0] * w[{k}][1] * (({keep}) - ({swap}));")
            back.append(f"dh[{2 * k}] = d{k}; dh[{2 * k + 1}] = -d{k};")
        return (
            "// H_res[i, j] = v[i ^ j], v the product of all softmax(h_k), arXiv 2601.21579.\n"
            + function("matrix(const vec* h, vec* out)", [*weights, *values, *entries])
            + function(
                "matrix_backward(const vec* g, const vec* h, vec* dh)", [*weights, *sums, *back]
            )
        )

    def triton(self, spec: SiteSpec) -> str:
        """The same products; see `Constraint.triton`."""
        return kronecker_triton(spec.streams)

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """Keep against swap: 2 to 0 in every factor, or 3 to -3 as in A.6."""
        pair = (3.0, -3.0) if init == "paper" else (2.0, 0.0)
        return torch.tensor(pair * _factors(streams), dtype=torch.float64)


def _factors(streams: int) -> int:
    return streams.bit_length() - 1


def _weights(logits: torch.Tensor, streams: int) -> torch.Tensor:
    """``(p_k, 1 - p_k)`` of every factor, ``[..., K, 2]``."""
    return logits.reshape(*logits.shape[:-1], _factors(streams), 2).softmax(-1)


def _xor_table(streams: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(streams, device=device)
    return index[:, None] ^ index


def _product(weights: torch.Tensor) -> torch.Tensor:
    """Kronecker product over the second last axis: ``[..., K, 2]`` to ``[..., 2^K]``."""
    product = weights.new_ones(*weights.shape[:-2], 1)
    for factor in weights.unbind(-2):
        product = (product[..., None] * factor[..., None, :]).flatten(-2)
    return product
