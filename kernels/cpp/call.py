"""What every launch of a generated function shares: its library, its arguments, its threads."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mhc_compile.kernels.cpp.build import load
from mhc_compile.kernels.cpp.emit import source
from mhc_compile.kernels.spec import SiteSpec

_BLOCK = 16  # tokens: fewer are not worth a thread of their own


@cache
def library(spec: SiteSpec, dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled functions of one site.

    Raises:
        KernelError: they cannot be built.
    """
    return load(source(spec, dtype))


def dense(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor without gaps, in another dtype if one is given."""
    return tensor.to(dtype or tensor.dtype).contiguous()


def coefficients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each `dense` in float32."""
    return [dense(tensor, torch.float32) for tensor in tensors]


def tokens_and_threads(X: torch.Tensor) -> tuple[int, int]:
    """Tokens of a state ``[..., n, C]``, and how many threads share them."""
    tokens = X.shape[:-2].numel()
    return tokens, max(1, min(torch.get_num_threads(), -(-tokens // _BLOCK)))


def call(
    built: ctypes.CDLL,
    name: str,
    arguments: Sequence[torch.Tensor | float],
    X: torch.Tensor,
) -> None:
    """Run ``mhc_<name>`` on the tokens of a state ``[..., n, C]``.

    Args:
        built: the library.
        name: the function; if ``mhc_<name>_workspace`` exists it gets that much memory besides.
        arguments: tensors, which are dense, and numbers, in the function's order.
        X: the state.
    """
    tokens, threads = tokens_and_threads(X)
    channels = X.shape[-1]
    function, size = _functions(built, name, tuple(map(type, arguments)))
    # `arguments` outlives the call, and with it the copies among its tensors.
    values = [
        argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
        for argument in arguments
    ]
    if size is not None:
        workspace = torch.empty(size(channels, threads))
        values.append(workspace.data_ptr())
    function(*values, tokens, channels, threads)


@cache
def _functions(built: ctypes.CDLL, name: str, kinds: tuple[type, ...]) -> tuple[Any, Any]:
    """The function and the one that says what workspace it needs (or None), ready to be called."""
    function = built[f"mhc_{name}"]
    function.argtypes = [ctypes.c_float if kind is float else ctypes.c_void_p for kind in kinds]
    function.restype = None
    try:
        size = built[f"mhc_{name}_workspace"]
    except AttributeError:
        size = None
    else:
        size.argtypes, size.restype = [ctypes.c_long, ctypes.c_int], ctypes.c_long
        function.argtypes = [*function.argtypes, ctypes.c_void_p]
    function.argtypes = [*function.argtypes, ctypes.c_long, ctypes.c_long, ctypes.c_int]
    return function, size
