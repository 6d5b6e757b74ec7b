"""What every launch of a generated function shares: its library, its arguments, its threads."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mhc_compile.kernels.cpp.build import load
from mhc_compile.kernels.cpp.emit import Part, source
from mhc_compile.kernels.layout import is_by_output
from mhc_compile.kernels.spec import SiteSpec

_BLOCK = 16  # tokens: fewer are not worth a thread of their own


@cache
def library(spec: SiteSpec, dtype: torch.dtype, part: Part = "site") -> ctypes.CDLL:
    """The compiled functions of some ops of one site.

    Raises:
        KernelError: they cannot be built.
    """
    return load(source(spec, dtype, part))


def coefficients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each in float32 and without gaps."""
    return [
        # Most are; at one token these two questions are cheaper than the calls.
        tensor
        if tensor.dtype is torch.float32 and tensor.is_contiguous()
        else tensor.to(torch.float32).contiguous()
        for tensor in tensors
    ]


def coefficient(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """`coefficients` of what may be absent."""
    return None if tensor is None else coefficients(tensor)[0]


def projection(phi: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Phi in float32 and without gaps, and whether its transpose is what lies in memory."""
    phi = phi.to(torch.float32)
    if is_by_output(phi):
        return phi.t().contiguous(), True
    return phi.contiguous(), False


def streams_last(X: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """A state as ``[..., n, C]`` without gaps; copied unless its memory has that order."""
    if spec.dim == -1:
        return X.contiguous()
    return X.movedim((spec.dim - 1, spec.dim), (-2, -1)).contiguous()


def size_of(rows: torch.Tensor) -> tuple[int, int]:
    """Tokens and channels of ``[..., n, C]``."""
    *tokens, _, channels = rows.shape
    return math.prod(tokens), channels


def channels_last(x: torch.Tensor, spec: SiteSpec, dtype: torch.dtype) -> torch.Tensor:
    """An un-widened tensor as ``[..., C]`` in ``dtype`` and without gaps, copied if need be."""
    x = x.to(dtype)
    return x.contiguous() if spec.dim == -1 else x.movedim(spec.dim, -1).contiguous()


def state_back(X: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``[..., n, C]`` in the layout of the site, contiguous."""
    if spec.dim == -1:
        return X
    return X.movedim((-2, -1), (spec.dim - 1, spec.dim)).contiguous()


def narrow_back(x: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``[..., C]`` in the layout of the site, contiguous."""
    return x if spec.dim == -1 else x.movedim(-1, spec.dim).contiguous()


def call(
    built: ctypes.CDLL,
    name: str,
    arguments: Sequence[torch.Tensor | None],
    tokens: int,
    channels: int,
    *flags: bool,
) -> None:
    """Run one generated function, on as many threads as torch uses.

    Args:
        built: the library.
        name: the function is ``mhc_<name>``; if ``mhc_<name>_workspace`` exists it gets that much
            memory besides.
        arguments: dense tensors, in the function's order; None is a null pointer.
        tokens: number of tokens.
        channels: width of a stream.
        flags: what else the function asks for.
    """
    threads = max(1, min(torch.get_num_threads(), -(-tokens // _BLOCK)))
    function, size = _functions(built, name, len(arguments), len(flags))
    # `arguments` outlives the call, and with it the copies among its tensors.
    values = [None if argument is None else argument.data_ptr() for argument in arguments]
    if size is not None:
        workspace = torch.empty(size(channels, threads))
        values.append(workspace.data_ptr())
    function(*values, tokens, channels, threads, *flags)


@cache
def _functions(built: ctypes.CDLL, name: str, pointers: int, flags: int) -> tuple[Any, Any]:
    """The function and the one that says what workspace it needs (or None), ready to be called."""
    function: Any = built[f"mhc_{name}"]
    size: Any = getattr(built, f"mhc_{name}_workspace", None)
    if size is not None:
        size.argtypes, size.restype = [ctypes.c_long, ctypes.c_int], ctypes.c_long
        pointers += 1
    numbers = [ctypes.c_long, ctypes.c_long, *[ctypes.c_int] * (1 + flags)]
    function.argtypes, function.restype = [ctypes.c_void_p] * pointers + numbers, None
    return function, size
