"""The generated seam with the norm of its branch input called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.call import (
    call,
    channels_last,
    coefficient,
    coefficients,
    library,
    narrow_back,
    projection,
    size_of,
    state_back,
    streams_last,
)
from mhc_compile.kernels.cpp.launch_apart import ParameterGradients
from mhc_compile.kernels.layout import SeamNormGradients
from mhc_compile.kernels.spec import SiteSpec


def seam_norm(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::seam_norm``; ``shapes`` are those of the next h_post, h_res, saved and statistics."""
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    tokens, channels = size_of(rows)
    out, y = rows.new_empty(rows.shape), branch.new_empty(branch.shape)
    results = [X.new_empty(shape, dtype=torch.float32) for shape in shapes]
    h_post_next, h_res_next, saved, statistics = results
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=h_res_next)
    weights, by_output = projection(phi)
    given = (rows, branch, *coefficients(h_post, h_res), weights, *coefficients(bias, alpha))
    arguments = (*given, coefficient(weight), coefficient(shift), out, y, *results)
    call(library(spec, X.dtype, "normed"), "seam_norm", arguments, tokens, channels, by_output)
    state, y = state_back(out, spec), narrow_back(y, spec)
    return state, y, h_post_next, h_res_next, saved, statistics


def seam_norm_backward(
    dX_next: torch.Tensor,
    dy: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    saved: torch.Tensor,
    statistics: torch.Tensor,
    spec: SiteSpec,
) -> SeamNormGradients:
    """``mhc::seam_norm_backward``."""
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    tokens, channels = size_of(rows)
    dX, df = rows.new_empty(rows.shape), branch.new_empty(branch.shape)
    dh_post = h_post.new_empty(h_post.shape, dtype=torch.float32)
    dh_res = h_res.new_zeros(h_res.shape, dtype=torch.float32)
    dweight, dshift = (X.new_empty(channels, dtype=torch.float32) for _ in range(2))
    grads = ParameterGradients((phi, bias, alpha), saved, spec, with_dz=False)
    dphi, dbias, dalpha, _ = grads.pointers
    weights, by_output = projection(phi)
    arguments = (
        streams_last(dX_next.to(X.dtype), spec),
        channels_last(dy, spec, X.dtype),
        *coefficients(dh_post_next, dh_res_next),
        rows,
        branch,
        *coefficients(h_post, h_res),
        weights,
        *coefficients(bias, alpha),
        coefficient(weight),
        *coefficients(saved, statistics),
        *(dX, df, dh_post, dh_res, dphi, dbias, dalpha, dweight, dshift),
    )
    built = library(spec, X.dtype, "normed")
    call(built, "seam_norm_backward", arguments, tokens, channels, by_output)
    empty = X.new_empty(0, dtype=torch.float32)
    return (
        state_back(dX, spec),
        narrow_back(df, spec).to(f.dtype),
        dh_post.to(h_post.dtype),
        dh_res.to(h_res.dtype),
        *grads.results,
        empty if weight is None else dweight.to(weight.dtype),
        empty.clone() if shift is None else dshift.to(shift.dtype),
    )
