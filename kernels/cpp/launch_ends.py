"""The generated collapse and Sinkhorn iteration called with tensors; see `launch`."""

import torch

from mhc_compile.kernels.coefficients import gate_weights, gate_weights_backward
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
from mhc_compile.kernels.spec import SiteSpec


def collapse(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    spec: SiteSpec,
) -> torch.Tensor:
    """``mhc::collapse``."""
    rows = streams_last(X, spec)
    if bias is None:
        out = rows.new_empty((*rows.shape[:-2], rows.shape[-1]))
        tokens, channels = size_of(rows)
        call(library(spec, X.dtype, "ends"), mode, (rows, out), tokens, channels)
    elif phi is None or alpha is None:
        weights = gate_weights(bias.float(), 1.0, "sigmoid") + spec.pre_eps
        out = mix_by(rows, weights, spec)
    else:
        out, _ = _head(rows, phi, bias, alpha, spec)
    return narrow_back(out, spec)


def collapse_backward(
    dx: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::collapse_backward``, of a learned collapse."""
    rows, g = streams_last(X, spec), channels_last(dx, spec, X.dtype)
    empty = X.new_empty(0, dtype=torch.float32)
    if phi is None or alpha is None:
        h = bias.float()
        weights = gate_weights(h, 1.0, "sigmoid") + spec.pre_eps
        dX, dweights = mix_by_backward(g, rows, weights, spec)
        dbias = gate_weights_backward(dweights, h, 1.0, "sigmoid").to(bias.dtype)
        return state_back(dX, spec), empty, dbias, empty.clone()
    _, saved = _head(rows, phi, bias, alpha, spec)
    dX = rows.new_empty(rows.shape)
    grads = ParameterGradients((phi, bias, alpha), saved, spec, with_dz=False)
    weights, by_output = projection(phi)
    given = (weights, *coefficients(bias, alpha), saved, None)
    arguments = (g, empty, empty, rows, None, *given, dX, *grads.pointers, None)
    tokens, channels = size_of(rows)
    call(library(spec, X.dtype, "head"), "pre_backward", arguments, tokens, channels, by_output)
    return state_back(dX, spec), *grads.results


def read(X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::read``."""
    return narrow_back(mix_by(streams_last(X, spec), gates, spec), spec)


def read_backward(
    du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mhc::read_backward``."""
    rows, g = streams_last(X, spec), channels_last(du, spec, X.dtype)
    dX, dgates = mix_by_backward(g, rows, gates, spec)
    return state_back(dX, spec), dgates.to(gates.dtype)


def _head(
    rows: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The collapsed ``[..., C]`` of ``[..., n, C]``, and what the backward reads again."""
    tokens, channels = size_of(rows)
    out = rows.new_empty((*rows.shape[:-2], channels))
    saved = rows.new_empty((tokens, spec.streams + 1), dtype=torch.float32)
    none = rows.new_empty(0)
    weights, by_output = projection(phi)
    arguments = (rows, weights, *coefficients(bias, alpha), None, out, none, none, saved)
    call(library(spec, rows.dtype, "head"), "pre", arguments, tokens, channels, by_output)
    return out, saved


def mix_by(rows: torch.Tensor, weights: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``sum_i weights[i] X_i`` of ``[..., n, C]``.

    Args:
        rows: the state.
        weights: n numbers that all tokens share, or the gates of a single-pass site.
        spec: the site.
    """
    out = rows.new_empty((*rows.shape[:-2], rows.shape[-1]))
    arguments = (rows, *coefficients(weights), out)
    tokens, channels = size_of(rows)
    call(library(spec, rows.dtype, "ends"), "read", arguments, tokens, channels)
    return out


def mix_by_backward(
    g: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, spec: SiteSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows and the weights of `mix_by`."""
    dX = rows.new_empty(rows.shape)
    dweights = weights.new_zeros(weights.shape, dtype=torch.float32)
    arguments = (g, rows, *coefficients(weights), dX, dweights)
    tokens, channels = size_of(rows)
    call(library(spec, rows.dtype, "ends"), "read_backward", arguments, tokens, channels)
    return dX, dweights


def sinkhorn(logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn``."""
    (rows,) = coefficients(logits)
    out = rows.new_empty(rows.shape)
    tokens = logits.shape[:-2].numel()
    call(library(spec, torch.float32, "sinkhorn"), "sinkhorn", (rows, out), tokens, 0)
    return out.to(logits.dtype)


def sinkhorn_backward(grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn_backward``."""
    arguments = coefficients(grad, logits)
    out = logits.new_empty(logits.shape, dtype=torch.float32)
    tokens, built = logits.shape[:-2].numel(), library(spec, torch.float32, "sinkhorn")
    call(built, "sinkhorn_backward", (*arguments, out), tokens, 0)
    return out.to(logits.dtype)
