"""The generated seam called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.call import (
    call,
    channels_last,
    coefficients,
    library,
    narrow_back,
    projection,
    size_of,
    state_back,
    streams_last,
)
from mhc_compile.kernels.cpp.launch_apart import ParameterGradients
from mhc_compile.kernels.cpp.launch_site import post, post_backward, pre, pre_backward
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
    if phi is None or alpha is None:
        # Without a projection there is little to share between the two halves.
        X_next = post(X, f, h_post, h_res, spec)
        gates = h_post if spec.single_pass else None
        return (X_next, *pre(X_next, phi, bias, alpha, spec, shapes, gates))
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    tokens, channels = size_of(rows)
    out, u = rows.new_empty(rows.shape), branch.new_empty(branch.shape)
    h_post_next, h_res_next, saved = (X.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=h_res_next)
    weights, by_output = projection(phi)
    parameters = (weights, *coefficients(bias, alpha))
    given = (rows, branch, *coefficients(h_post, h_res), *parameters)
    arguments = (*given, out, u, h_post_next, h_res_next, saved)
    call(library(spec, X.dtype), "seam", arguments, tokens, channels, by_output)
    return state_back(out, spec), narrow_back(u, spec), h_post_next, h_res_next, saved


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
    with_dz: bool = False,
) -> SeamGradients:
    """``mhc::seam_backward``, or ``mhc::seam_backward_dz``."""
    if phi is None or alpha is None:
        X_next = post(X, f, h_post, h_res, spec)
        gates = h_post if spec.single_pass else None
        dX, dphi, dbias, dalpha, dgates = pre_backward(
            du, dh_post_next, dh_res_next, X_next, phi, bias, alpha, saved, spec, gates=gates
        )
        dX, df, dh_post, dh_res = post_backward(dX.add_(dX_next), X, f, h_post, h_res, spec)
        dh_post = dh_post if gates is None else dh_post.add_(dgates)
        return dX, df, dh_post, dh_res, dphi, dbias, dalpha
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    tokens, channels = size_of(rows)
    dX, df = rows.new_empty(rows.shape), branch.new_empty(branch.shape)
    dh_post = h_post.new_empty(h_post.shape, dtype=torch.float32)
    dh_res = h_res.new_zeros(h_res.shape, dtype=torch.float32)
    grads = ParameterGradients((phi, bias, alpha), saved, spec, with_dz)
    weights, by_output = projection(phi)
    arguments = (
        streams_last(dX_next.to(X.dtype), spec),
        channels_last(du, spec, X.dtype),
        *coefficients(dh_post_next, dh_res_next),
        rows,
        branch,
        *coefficients(h_post, h_res),
        weights,
        *coefficients(bias, alpha, saved),
        dX,
        df,
        dh_post,
        dh_res,
        *grads.pointers,
    )
    call(library(spec, X.dtype), "seam_backward", arguments, tokens, channels, by_output)
    df = narrow_back(df, spec).to(f.dtype)
    mappings = dh_post.to(h_post.dtype), dh_res.to(h_res.dtype)
    return state_back(dX, spec), df, *mappings, *grads.results
