"""`Constraint`: how the stream mixing H_res is made from unconstrained numbers."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch

from mhc_compile.kernels.spec import SiteSpec

Gate = Literal["sigmoid", "tanh"]


class Constraint(ABC):
    """A manifold (or set) of n x n stream mixings.

    Matrices are ``[..., out, in]`` everywhere: ``X'_i = sum_j H_res[i, j] X_j``. Methods compute in
    the dtype of their input and do not mutate it. To add a manifold, write one module with one
    subclass and name it in `mhc_compile.kernels.constraints`.
    """

    name: ClassVar[str]
    """What `SiteSpec.constraint` calls it."""
    default_eps: ClassVar[float] = 0.0
    """Default of ``sinkhorn_eps`` and ``pre_eps``."""
    gate: ClassVar[Gate] = "sigmoid"
    """"sigmoid": ``H_pre = sigmoid(h)``, ``H_post = 2 sigmoid(h)`` with ``h = alpha z / r + bias``,
    equations (16) to (18). "tanh": both are ``alpha tanh(z / r) + bias``, arXiv 2409.19606."""
    per_stream: ClassVar[bool] = False
    """Each stream is normed and projected on its own, instead of all n C values together."""
    mixes: ClassVar[bool] = True
    """False: H_res is the identity for every token, and ops need not apply it."""

    doubly_stochastic: ClassVar[bool] = True
    """No entry of H_res is negative, and rows and columns sum to 1 (columns of the Sinkhorn
    constraints only in the limit)."""

    def check(self, streams: int) -> None:  # noqa: B027 - most constraints take every number
        """Refuse a number of streams that has no such matrix.

        Raises:
            KernelError: with the numbers that are possible.
        """

    @abstractmethod
    def logits(self, streams: int) -> int:
        """Number k of logits from which one matrix is made."""

    @abstractmethod
    def matrix(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """Make H_res.

        Args:
            logits: ``[..., k]``.
            spec: the site.

        Returns:
            ``[..., n, n]`` in [out, in] order, differentiable by autograd.
        """

    @abstractmethod
    def matrix_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """Gradient of `matrix`, recomputing what it needs; runs below autograd.

        Args:
            grad: ``[..., n, n]``, the gradient of the matrix.
            logits: ``[..., k]``, what `matrix` was given.
            spec: the site.

        Returns:
            ``[..., k]``.
        """

    @abstractmethod
    def cpp(self, spec: SiteSpec) -> str:
        """Its lines of the generated C++ source, for a vector of tokens.

        Returns:
            Definitions of ``matrix(const vec* h, vec* out)``, from k logits to n * n entries in
            [out, in] order, and of ``matrix_backward(const vec* g, const vec* h, vec* dh)``.
        """

    @abstractmethod
    def triton(self, spec: SiteSpec) -> str:
        """Its lines of the generated Triton source, for a block of tokens.

        Returns:
            Functions for ``@triton.jit`` code: ``matrix(h0, h1, ...)`` from k logits to the tuple
            of n * n entries in [out, in] order, and ``matrix_backward(g0, ..., h0, ...)`` from the
            gradients of the entries, then the logits, to the tuple of the k gradients of those.
            Every number is a float32 block ``[tokens]``; entries that no token changes may be
            constants. Neither is defined unless `mixes`.
        """

    @abstractmethod
    def initial_bias(self, streams: int, init: str) -> torch.Tensor:
        """The logits a site starts from.

        Args:
            streams: number n of streams.
            init: "preserve" gives rows that sum to 1, near enough to the identity to keep streams
                apart and far enough from saturation to keep the gradient alive; "paper" is
                appendix A.6 of arXiv 2512.24880, or what comes closest.

        Returns:
            ``[k]``, float64.
        """


def softmax_backward(grad: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Gradient of ``weights = softmax(logits, dim)`` with respect to the logits."""
    return weights * (grad - (grad * weights).sum(dim, keepdim=True))
