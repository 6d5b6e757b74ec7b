"""The generated functions called with tensors.

Results have the shapes and dtypes of the ops' own bodies. Callers have asked `select.obstacle` before: the
state is ``[..., n, C]`` on the CPU in a dtype of `STREAM_TYPES`.
"""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.call import call, coefficients, dense, library
from mhc_compile.kernels.cpp.launch_seam import seam, seam_backward
from mhc_compile.kernels.spec import SiteSpec

__all__ = [
    "collapse",
    "post",
    "post_backward",
    "pre",
    "pre_backward",
    "seam",
    "seam_backward",
]


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
    u = X.new_empty((*X.shape[:-2], X.shape[-1]))
    h_post, h_res, saved = (X.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=h_res)
    arguments = (dense(X), *coefficients(phi, bias, alpha), u, h_post, h_res, saved)
    call(library(spec, X.dtype), "pre", arguments, X)
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
    dX = X.new_empty(X.shape)
    grads = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in (phi, bias, alpha)]
    arguments = (
        dense(du, X.dtype),
        *coefficients(dh_post, dh_res),
        dense(X),
        *coefficients(phi, bias, alpha, saved),
        dX,
        *grads,
    )
    call(library(spec, X.dtype), "pre_backward", arguments, X)
    dphi, dbias, dalpha = (
        grad.to(tensor.dtype) for grad, tensor in zip(grads, (phi, bias, alpha), strict=True)
    )
    return dX, dphi, dbias, dalpha


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    out = X.new_empty(X.shape)
    arguments = (dense(X), dense(f, X.dtype), *coefficients(h_post, h_res), out)
    call(library(spec, X.dtype), "post", arguments, X)
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
    arguments = (
        dense(dY, X.dtype),
        dense(X),
        dense(f, X.dtype),
        *coefficients(h_post, h_res),
        dX,
        df,
        dh_post,
        dh_res,
    )
    call(library(spec, X.dtype), "post_backward", arguments, X)
    return dX, df.to(f.dtype), dh_post.to(h_post.dtype), dh_res.to(h_res.dtype)


def collapse(X: torch.Tensor, mode: str, spec: SiteSpec) -> torch.Tensor:
    """``mhc::collapse`` with ``mode`` "mean" or "sum"."""
    out = X.new_empty((*X.shape[:-2], X.shape[-1]))
    divisor = float(spec.streams) if mode == "mean" else 1.0
    call(library(spec, X.dtype), "collapse", (dense(X), out, divisor), X)
    return out
