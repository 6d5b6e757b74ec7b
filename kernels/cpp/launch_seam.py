"""The generated seam called with tensors; see `mhc_compile.kernels.cpp.launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.call import call, coefficients, dense, library
from mhc_compile.kernels.layout import SeamGradients
from mhc_compile.kernels.spec import SiteSpec

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
) -> Five:
    """``mhc::seam``; ``shapes`` are those of the next h_post, h_res and saved."""
    assert phi is not None, "`obstacle` refuses static mappings"
    assert alpha is not None
    X_next, u = X.new_empty(X.shape), X.new_empty((*X.shape[:-2], X.shape[-1]))
    mappings = [X.new_empty(shape, dtype=torch.float32) for shape in shapes]
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=mappings[1])
    arguments = (
        dense(X),
        dense(f, X.dtype),
        *coefficients(h_post, h_res, phi, bias, alpha),
        X_next,
        u,
        *mappings,
    )
    call(library(spec, X.dtype), "seam", arguments, X)
    return X_next, u, mappings[0], mappings[1], mappings[2]


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
    """``mhc::seam_backward``: gradients of X, f, h_post, h_res, phi, bias and alpha."""
    assert phi is not None, "`obstacle` refuses static mappings"
    assert alpha is not None
    dX, df = X.new_empty(X.shape), X.new_empty(f.shape)
    dh_post = h_post.new_empty(h_post.shape, dtype=torch.float32)
    dh_res = h_res.new_zeros(h_res.shape, dtype=torch.float32)
    parameters = (phi, bias, alpha)
    grads = [tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in parameters]
    arguments = (
        dense(dX_next, X.dtype),
        dense(du, X.dtype),
        *coefficients(dh_post_next, dh_res_next),
        dense(X),
        dense(f, X.dtype),
        *coefficients(h_post, h_res, phi, bias, alpha, saved),
        dX,
        df,
        dh_post,
        dh_res,
        *grads,
    )
    call(library(spec, X.dtype), "seam_backward", arguments, X)
    narrow = (f, h_post, h_res, *parameters)
    results = (df, dh_post, dh_res, *grads)
    df, dh_post, dh_res, dphi, dbias, dalpha = (
        grad.to(like.dtype) for grad, like in zip(results, narrow, strict=True)
    )
    return dX, df, dh_post, dh_res, dphi, dbias, dalpha
