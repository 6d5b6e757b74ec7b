"""Shapes of states and tokens, and the checks that every op makes on its tensors.

For an un-widened tensor of shape ``s`` with channel axis ``dim`` (negative), the state has shape
``s[:dim] + (n,) + s[dim:]``; the tokens are ``s`` without the channel axis, in order. So
``[B, T, C]`` (dim -1) becomes ``[B, T, n, C]``, and ``[B, C, H, W]`` (dim -3) becomes
``[B, n, C, H, W]`` with tokens ``[B, H, W]``. Everything here works on symbolic sizes.
"""

from collections.abc import Sequence

import torch

from mhc_compile.errors import KernelError

PreGradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradients of X, phi, bias, alpha and gates: what ``mhc::pre_backward`` returns."""

SeamGradients = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]
"""Gradients of X, f, h_post, h_res, phi, bias and alpha: what ``mhc::seam_backward`` returns."""

SeamNormGradients = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]
"""`SeamGradients`, then those of weight and shift: what ``mhc::seam_norm_backward`` returns."""


def widened_shape(shape: Sequence[int], streams: int, dim: int) -> list[int]:
    """Shape of the state for an un-widened ``shape``."""
    at = len(shape) + dim
    return [*shape[:at], streams, *shape[at:]]


def narrow_shape(shape: Sequence[int], dim: int) -> list[int]:
    """Shape of the un-widened tensor for the ``shape`` of a state."""
    at = len(shape) + dim - 1
    return [*shape[:at], *shape[at + 1 :]]


def token_shape(shape: Sequence[int], dim: int) -> list[int]:
    """Shape of the tokens for the ``shape`` of a state."""
    at = len(shape) + dim
    return [*shape[: at - 1], *shape[at + 1 :]]


def dz_width(saved: int, streams: int) -> int:
    """Numbers per token of what a backward leaves for later: the gradient of z comes first.

    Behind it is room for what else kernels keep there, a factor of x for each norm and H_pre, and
    for rows to begin at multiples of 16 bytes.

    Args:
        saved: numbers per token that `pre` saves.
        streams: n.
    """
    return -(-(saved + streams) // 4) * 4


def is_by_output(phi: torch.Tensor) -> bool:
    """Whether phi ``[n * C, m]`` is the transpose of what is dense, a weight of ``nn.Linear``."""
    return phi.stride(0) == 1 and phi.shape[1] > 1


def empty_phi(phi: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for the gradient of phi, in the order of phi's own memory."""
    if is_by_output(phi):
        return phi.new_empty(phi.shape[::-1], dtype=dtype).t()
    return phi.new_empty(phi.shape, dtype=dtype)


def like_phi(dphi: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """A gradient of phi in the order of phi's own memory, and in its dtype."""
    dphi = dphi.to(phi.dtype)
    return dphi.t().contiguous().t() if is_by_output(phi) else dphi.contiguous()


def state_to_tokens(X: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A state as ``[T, n, C]`` in ``dtype``; a view where layout and dtype allow."""
    moved = X.movedim((dim - 1, dim), (-2, -1))
    return moved.reshape(-1, *moved.shape[-2:]).to(dtype)


def tokens_to_state(tokens: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    """``[T, n, C]`` as a contiguous state of the shape and dtype of ``like``."""
    shape = token_shape(like.shape, dim)
    state = tokens.reshape(*shape, *tokens.shape[-2:]).movedim((-2, -1), (dim - 1, dim))
    return state.to(like.dtype).contiguous()


def narrow_to_tokens(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """An un-widened tensor as ``[T, C]`` in ``dtype``; a view where layout and dtype allow."""
    moved = x.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1]).to(dtype)


def tokens_to_narrow(
    tokens: torch.Tensor, shape: Sequence[int], dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """``[T, C]`` as a contiguous un-widened tensor of the given ``shape`` and ``dtype``."""
    lead = [*shape[: len(shape) + dim], *shape[len(shape) + dim + 1 :]]
    return tokens.reshape(*lead, tokens.shape[-1]).movedim(-1, dim).to(dtype).contiguous()


def mix(h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Batched ``h @ tokens``: ``[T or 1, i, n]`` times ``[T, n, C]``.

    Not ``@``, which multiplies in another order if its inputs require grad. Then compiled code, or
    a recomputation without grad, would not give the bits of the eager forward.
    """
    return torch.bmm(h.expand(len(tokens), -1, -1), tokens)


def coefficient_dtype(X: torch.Tensor) -> torch.dtype:
    """float32, except for a float64 state: norms, gates and constraints never run in half."""
    return torch.float64 if X.dtype == torch.float64 else torch.float32


def check_state(op: str, X: torch.Tensor, streams: int, dim: int) -> None:
    """Check that ``X`` is a state of ``streams`` streams.

    Raises:
        KernelError: it is not.
    """
    if not X.dtype.is_floating_point:
        raise KernelError(f"{op}: the state is {X.dtype}; streams hold floating point numbers only")
    if X.dim() < 1 - dim:
        raise KernelError(
            f"{op}: a state with its channels on axis {dim} has at least {1 - dim} axes, "
            f"this one has shape {tuple(X.shape)}; widen the tensor with mhc::expand first"
        )
    if X.shape[dim - 1] != streams:
        raise KernelError(
            f"{op}: axis {dim - 1} of the state holds the {streams} streams, but its shape is "
            f"{tuple(X.shape)}; check the specification's n and dim"
        )


def check_tensor(
    op: str, name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor
) -> None:
    """Check one floating point argument against the shape it must have and the state's device.

    Raises:
        KernelError: shape, dtype or device do not fit.
    """
    if not tensor.dtype.is_floating_point:
        raise KernelError(f"{op}: {name} is {tensor.dtype}; give a floating point tensor")
    if list(tensor.shape) != list(shape):
        raise KernelError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, but a state of shape "
            f"{tuple(like.shape)} needs {tuple(shape)}"
        )
    if tensor.device != like.device:
        raise KernelError(
            f"{op}: {name} is on {tensor.device} and the state on {like.device}; move one of them"
        )
