"""The generated functions called with tensors.

Results have the shapes and dtypes of the ops' own bodies. Callers have asked `use_cpp` before: the
state is ``[..., n, C]`` on the CPU in a dtype of `STREAM_TYPES`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.build import load
from mhc_compile.kernels.cpp.emit import source
from mhc_compile.kernels.layout import SeamGradients
from mhc_compile.kernels.spec import SiteSpec

_BLOCK = 16  # tokens: fewer are not worth a thread of their own


@cache
def library(spec: SiteSpec, dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled functions of one site.

    Raises:
        KernelError: they cannot be built.
    """
    built = load(source(spec, dtype))
    for name in ("mhc_pre_workspace", "mhc_pre_backward_workspace"):
        getattr(built, name).restype = ctypes.c_long
    return built


def pre(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre``; ``shapes`` are those of h_post, h_res and saved."""
    assert phi is not None, "`obstacle` refuses static mappings"
    assert alpha is not None
    built, channels = library(spec, X.dtype), X.shape[-1]
    tokens, threads = _tokens_and_threads(X)
    u = X.new_empty((*X.shape[:-2], channels))
    h_post, h_res, saved = (X.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=h_res)
    workspace = _workspace(built.mhc_pre_workspace, channels, threads)
    results = (u, h_post, h_res, saved)
    arguments = (_dense(X), *_coefficients(phi, bias, alpha), *results, workspace)
    _call(built.mhc_pre, arguments, tokens, channels, threads)
    return u, h_post, h_res, saved


def pre_backward(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre_backward``."""
    assert phi is not None, "`obstacle` refuses static mappings"
    assert alpha is not None
    built, channels = library(spec, X.dtype), X.shape[-1]
    tokens, threads = _tokens_and_threads(X)
    dX = X.new_empty(X.shape)
    grads = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (phi, bias, alpha)]
    arguments = (
        _dense(du, X.dtype),
        *_coefficients(dh_post, dh_res),
        _dense(X),
        *_coefficients(phi, bias, alpha, saved),
        dX,
        *grads,
        _workspace(built.mhc_pre_backward_workspace, channels, threads),
    )
    _call(built.mhc_pre_backward, arguments, tokens, channels, threads)
    dphi, dbias, dalpha = (
        grad.to(tensor.dtype) for grad, tensor in zip(grads, (phi, bias, alpha), strict=True)
    )
    return dX, dphi, dbias, dalpha


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    out = X.new_empty(X.shape)
    tokens, threads = _tokens_and_threads(X)
    arguments = (_dense(X), _dense(f, X.dtype), *_coefficients(h_post, h_res), out)
    _call(library(spec, X.dtype).mhc_post, arguments, tokens, X.shape[-1], threads)
    return out


def post_backward(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::post_backward``."""
    dX, df = X.new_empty(X.shape), X.new_empty(f.shape)
    dh_post = h_post.new_empty(h_post.shape, dtype=torch.float32)
    dh_res = h_res.new_zeros(h_res.shape, dtype=torch.float32)
    tokens, threads = _tokens_and_threads(X)
    arguments = (
        _dense(dY, X.dtype),
        _dense(X),
        _dense(f, X.dtype),
        *_coefficients(h_post, h_res),
        dX,
        df,
        dh_post,
        dh_res,
    )
    built = library(spec, X.dtype)
    _call(built.mhc_post_backward, arguments, tokens, X.shape[-1], threads)
    return dX, df.to(f.dtype), dh_post.to(h_post.dtype), dh_res.to(h_res.dtype)


def seam(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::seam``; ``shapes`` are those of h_post, h_res and saved."""
    X_next = post(X, f, h_post, h_res, spec)
    return (X_next, *pre(X_next, phi, bias, alpha, spec, shapes))


def seam_backward(
    dX_next: torch.Tensor,
    du: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    spec: SiteSpec,
) -> SeamGradients:
    """``mhc::seam_backward``."""
    X_next = post(X, f, h_post, h_res, spec)
    dX, *dparameters = pre_backward(
        du, dh_post_next, dh_res_next, X_next, phi, bias, alpha, saved, spec
    )
    dphi, dbias, dalpha = dparameters
    return (*post_backward(dX.add_(dX_next), X, f, h_post, h_res, spec), dphi, dbias, dalpha)


def collapse(X: torch.Tensor, mode: str, spec: SiteSpec) -> torch.Tensor:
    """``mhc::collapse`` with ``mode`` "mean" or "sum"."""
    out = X.new_empty((*X.shape[:-2], X.shape[-1]))
    tokens, threads = _tokens_and_threads(X)
    divisor = float(spec.streams) if mode == "mean" else 1.0
    arguments = (_dense(X), out, divisor)
    _call(library(spec, X.dtype).mhc_collapse, arguments, tokens, X.shape[-1], threads)
    return out


def _dense(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.to(dtype or tensor.dtype).contiguous()


def _coefficients(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [_dense(tensor, torch.float32) for tensor in tensors]


def _tokens_and_threads(X: torch.Tensor) -> tuple[int, int]:
    tokens = X.shape[:-2].numel()
    return tokens, max(1, min(torch.get_num_threads(), -(-tokens // _BLOCK)))


def _workspace(size: Any, channels: int, threads: int) -> torch.Tensor:
    return torch.empty(size(ctypes.c_long(channels), threads))


def _call(
    function: Any,
    arguments: Sequence[torch.Tensor | float],
    tokens: int,
    channels: int,
    threads: int,
) -> None:
    # `arguments` outlives the call, and with it the copies among its tensors.
    pointers = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, torch.Tensor)
        else ctypes.c_float(argument)
        for argument in arguments
    ]
    function(*pointers, ctypes.c_long(tokens), ctypes.c_long(channels), ctypes.c_int(threads))
