"""Orthogonal: rotations of the streams through the Cayley transform."""

from collections.abc import Iterator
from typing import ClassVar

import torch

from mhc_compile.kernels.constraints.base import Constraint
from mhc_compile.kernels.constraints.orthogonal_triton import orthogonal_triton
from mhc_compile.kernels.cpp.text import block, each, entry, function, row
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

    def cpp(self, spec: SiteSpec) -> str:
        """Gauss-Jordan elimination in registers; see `Constraint.cpp`.

        It needs no pivoting: the symmetric part of I + A is I, and that of every Schur complement
        is no smaller.
        """
        n = spec.streams
        pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
        invert = [f"for (int i = 0; i < {n * n}; ++i) b[i] = splat(i % {n + 1} == 0);"]
        for k, (i, j) in enumerate(pairs):
            invert.append(f"b[{i * n + j}] = h[{k}]; b[{j * n + i}] = -h[{k}];")

        def eliminate(k: str) -> Iterator[str]:
            kk = entry(k, k, n)
            yield f"const vec pivot{k} = 1.0f / b[{kk}];"
            yield f"b[{kk}] = splat(1);"
            yield from (f"b[{kj}] *= pivot{k};" for kj in row(k, n))
            if k.isdigit():
                for i in (i for i in range(n) if i != int(k)):
                    yield from eliminate_row(str(i), k)
            else:
                rows = block("if (i != k)", eliminate_row("i", k))
                yield from block(f"for (int i = 0; i < {n}; ++i)", rows)

        def eliminate_row(i: str, k: str) -> Iterator[str]:
            yield f"const vec factor{k}_{i} = b[{entry(i, k, n)}];"
            yield f"b[{entry(i, k, n)}] = vec{{}};"
            for ij, kj in zip(row(i, n), row(k, n), strict=True):
                yield f"b[{ij}] -= factor{k}_{i} * b[{kj}];"

        invert += each(n, "k", eliminate)
        # Pivots of 1 beside entries of many cost digits; one step of Newton, B (2 I - (I + A) B),
        # gets them back.
        invert += [
            f"vec a[{n * n}], rest[{n * n}];",
            f"for (int i = 0; i < {n * n}; ++i) a[i] = splat(i % {n + 1} == 0);",
            *(
                f"a[{i * n + j}] = h[{k}]; a[{j * n + i}] = -h[{k}];"
                for k, (i, j) in enumerate(pairs)
            ),
            *_products("rest", "splat(i == j ? 2 : 0)", "-", "a", "b", n),
            f"for (int i = 0; i < {n * n}; ++i) a[i] = b[i];",
            *_products("b", "vec{}", "+", "a", "rest", n),
        ]
        entries = [
            f"out[{i}] = 2.0f * b[{i}]{' - 1.0f' * (i % (n + 1) == 0)};" for i in range(n * n)
        ]
        back = [f"vec c[{n * n}], d[{n * n}];"]
        back += _products("c", "vec{}", "+", "b", "g", n, transposed=(True, False))
        back += _products("d", "vec{}", "+", "c", "b", n, transposed=(False, True))
        back += [
            f"dh[{k}] = -2.0f * (d[{i * n + j}] - d[{j * n + i}]);"
            for k, (i, j) in enumerate(pairs)
        ]
        inverse = [f"vec b[{n * n}];", "invert(h, b);"]
        return (
            "// H_res = (I - A)(I + A)^-1 = 2 B - I with B = (I + A)^-1, A skew-symmetric.\n"
            + function("invert(const vec* h, vec* b)", invert)
            + function("matrix(const vec* h, vec* out)", [*inverse, *entries])
            + function("matrix_backward(const vec* g, const vec* h, vec* dh)", [*inverse, *back])
        )

    def triton(self, spec: SiteSpec) -> str:
        """The same elimination; see `Constraint.triton`."""
        return orthogonal_triton(spec.streams)

    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """Zero, the identity, for either ``init``; the Jacobian there is -2, not 0."""
        return torch.zeros(self.logits(streams), dtype=torch.float64)


def _products(
    out: str,
    start: str,
    sign: str,
    left: str,
    right: str,
    n: int,
    transposed: tuple[bool, bool] = (False, False),
) -> list[str]:
    """C++ loops for ``out = start + sign * left right``, the factors ``transposed`` or not."""
    ik = f"k * {n} + i" if transposed[0] else f"i * {n} + k"
    kj = f"j * {n} + k" if transposed[1] else f"k * {n} + j"
    return [
        f"for (int i = 0; i < {n}; ++i)",
        f"  for (int j = 0; j < {n}; ++j) {{",
        f"    vec sum = {start};",
        f"    for (int k = 0; k < {n}; ++k)",
        f"      sum {sign}= {left}[{ik}] * {right}[{kj}];",
        f"    {out}[i * {n} + j] = sum;",
        "  }",
    ]


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
