"""The generated pre and post called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.coefficients import gate_weights, gate_weights_backward
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
from mhc_compile.kernels.cpp.launch_ends import mix_by, mix_by_backward
from mhc_compile.kernels.layout import PreGradients, token_shape
from mhc_compile.kernels.spec import SiteSpec

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pre(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
    gates: torch.Tensor | None = None,
) -> Four:
    """``mhc::pre``; ``shapes`` are those of h_post, h_res and saved."""
    rows = streams_last(X, spec)
    if phi is None or alpha is None:
        return _static_pre(rows, bias, spec, gates)
    tokens, channels = size_of(rows)
    u = rows.new_empty((*rows.shape[:-2], channels))
    h_post, h_res, saved = (X.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if not constraint_of(spec).mixes:
        torch.eye(spec.streams, out=h_res)
    given = coefficient(gates)
    packed, by_output = projection(phi)
    parameters = (packed, *coefficients(bias, alpha))
    arguments = (rows, *parameters, given, u, h_post, h_res, saved)
    call(library(spec, X.dtype), "pre", arguments, tokens, channels, by_output)
    return narrow_back(u, spec), h_post, h_res, saved


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
    dX_more: torch.Tensor | None = None,
    with_dz: bool = False,
    gates: torch.Tensor | None = None,
) -> PreGradients:
    """``mhc::pre_backward``, or ``mhc::pre_backward_dz``; the latter has no gates."""
    rows, g = streams_last(X, spec), channels_last(du, spec, X.dtype)
    more = None if dX_more is None else streams_last(dX_more.to(X.dtype), spec)
    if phi is None or alpha is None:
        dX, dbias, dgates = _static_pre_backward(g, dh_post, dh_res, rows, bias, spec, gates)
        dX = dX if more is None else dX.add_(more)
        empty = X.new_empty(0, dtype=torch.float32)
        return state_back(dX, spec), empty, dbias, empty.clone(), dgates
    tokens, channels = size_of(rows)
    dX = rows.new_empty(rows.shape)
    grads = ParameterGradients((phi, bias, alpha), saved, spec, with_dz)
    weights, by_output = projection(phi)
    mappings, rest = coefficients(dh_post, dh_res), coefficients(bias, alpha, saved)
    dgates = X.new_zeros(0 if gates is None else gates.shape, dtype=torch.float32)
    given = (g, *mappings, rows, more, weights, *rest, coefficient(gates))
    arguments = (*given, dX, *grads.pointers, dgates)
    call(library(spec, X.dtype), "pre_backward", arguments, tokens, channels, by_output)
    dgates = dgates if gates is None else dgates.to(gates.dtype)
    return state_back(dX, spec), *grads.results, dgates


def _static_logits(bias: torch.Tensor, spec: SiteSpec) -> tuple[torch.Tensor, ...]:
    """Pre, post and res logits of the one mapping that all tokens share, ``[1, .]``."""
    n = spec.streams
    return torch.split(bias.float()[None], [n, n, constraint_of(spec).logits(n)], -1)


def _static_pre(
    rows: torch.Tensor, bias: torch.Tensor, spec: SiteSpec, gates: torch.Tensor | None
) -> Four:
    constraint = constraint_of(spec)
    pre_logits, post_logits, res_logits = _static_logits(bias, spec)
    with torch.autocast("cpu", enabled=False):
        h_pre = gate_weights(pre_logits, 1.0, constraint.gate) + spec.pre_eps
        h_post = gate_weights(post_logits, 2.0, constraint.gate)
        h_res = constraint.matrix(res_logits, spec)
    if gates is not None:
        h_pre, h_post = gates, torch.cat((h_pre, h_post), -1)
    u = narrow_back(mix_by(rows, h_pre, spec), spec)
    # Mappings can be views of the bias, or transposed; an op's outputs must not be.
    h_post, h_res = (h[0].clone(memory_format=torch.contiguous_format) for h in (h_post, h_res))
    return u, h_post, h_res, rows.new_empty(0, dtype=torch.float32)


def _static_pre_backward(
    g: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    spec: SiteSpec,
    gates: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    constraint = constraint_of(spec)
    pre_logits, post_logits, res_logits = _static_logits(bias, spec)
    with torch.autocast("cpu", enabled=False):
        h_pre = gate_weights(pre_logits, 1.0, constraint.gate) + spec.pre_eps
        weights = h_pre if gates is None else gates
        dX, dgates = mix_by_backward(g, rows, weights, spec)
        dh_pre, dh_post = dgates.flatten(), dh_post.float()
        if gates is not None:
            dh_pre, dh_post = dh_post.tensor_split(2)
        parts = [
            gate_weights_backward(dh_pre[None], pre_logits, 1.0, constraint.gate),
            gate_weights_backward(dh_post[None], post_logits, 2.0, constraint.gate),
        ]
        if constraint.mixes:
            parts.append(constraint.matrix_backward(dh_res.float()[None], res_logits, spec))
    dgates = dgates.new_empty(0) if gates is None else dgates.to(gates.dtype)
    return dX, torch.cat(parts, -1)[0].to(bias.dtype), dgates


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    out = rows.new_empty(rows.shape)
    arguments = (rows, branch, *coefficients(h_post, h_res), out)
    tokens, channels = size_of(rows)
    call(library(spec, X.dtype), "post", arguments, tokens, channels)
    return state_back(out, spec)


def mix(X: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::mix``."""
    rows = streams_last(X, spec)
    out = rows.new_empty(rows.shape)
    arguments = (rows, *coefficients(h_res), out)
    call(library(spec, X.dtype, "mix"), "mix", arguments, *size_of(rows))
    return state_back(out, spec)


def post_backward(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
) -> Four:
    """``mhc::post_backward``."""
    df = X.new_empty((*token_shape(X.shape, spec.dim), X.shape[spec.dim]))
    dX, dh_post, dh_res = _post_backward(dY, X, f, h_post, h_res, spec, df)
    return dX, narrow_back(df, spec).to(f.dtype), dh_post, dh_res


def post_backward_branch(
    dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post_backward_branch``."""
    rows = streams_last(dY, spec)
    tokens, channels = size_of(rows)
    df = rows.new_empty((*rows.shape[:-2], channels))
    arguments = (rows, *coefficients(h_post), df)
    call(library(spec, dY.dtype), "post_backward_branch", arguments, tokens, channels)
    return narrow_back(df, spec).to(dtype)


def post_backward_state(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::post_backward_state``."""
    return _post_backward(dY, X, f, h_post, h_res, spec, None)


def _post_backward(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
    df: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of X, h_post and h_res; that of f into ``df``, ``[..., C]``, if it is wanted."""
    rows, branch = streams_last(X, spec), channels_last(f, spec, X.dtype)
    g = streams_last(dY.to(X.dtype), spec)
    dX = rows.new_empty(rows.shape)
    dh_post = h_post.new_zeros(h_post.shape, dtype=torch.float32)
    dh_res = h_res.new_zeros(h_res.shape, dtype=torch.float32)
    arguments = (g, rows, branch, *coefficients(h_post, h_res), dX, df, dh_post, dh_res)
    tokens, channels = size_of(rows)
    call(library(spec, X.dtype), "post_backward", arguments, tokens, channels)
    return state_back(dX, spec), dh_post.to(h_post.dtype), dh_res.to(h_res.dtype)
