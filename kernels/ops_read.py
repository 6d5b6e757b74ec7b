"""``mhc::read``: one tensor of all streams by weights that are there already.

``u = sum_i H_pre[i] X_i`` with the H_pre of a site before: how a trunk of single-pass sites is
collapsed, and seen by readers in its middle.
"""

from typing import Any

import torch

from mhc_compile.kernels.layout import (
    check_state,
    check_tensor,
    coefficient_dtype,
    mix,
    narrow_shape,
    narrow_to_tokens,
    state_to_tokens,
    tokens_to_narrow,
    tokens_to_state,
)
from mhc_compile.kernels.ops_pre import check_gates, entry_gates, given_gradient, given_weights
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


@torch.library.custom_op("mhc::read", mutates_args=())
def read(X: torch.Tensor, gates: torch.Tensor | None, spec: str) -> torch.Tensor:
    """Pre-mix the streams, and nothing else.

    Args:
        X: the state, ``[..., n, C]`` (`mhc_compile.kernels.layout` has the other layouts).
        gates: the ``h_post`` of a single-pass site, whose first n numbers are the weights; None
            reads the first stream, as the first site of a trunk does.
        spec: `SiteSpec.encode`, of a single pass.

    Returns:
        The un-widened tensor, in the dtype of ``X``, rounded once.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    _check("mhc::read", X, gates, site)
    if gates is None:
        gates = entry_gates(X, site)
    if kernels := launcher("mhc::read", site, X, gates):
        return kernels.read(X, gates, site)
    dtype = coefficient_dtype(X)
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        out = mix(given_weights(gates, site, dtype)[:, None], x).squeeze(1)
    return tokens_to_narrow(out, narrow_shape(X.shape, site.dim), site.dim, X.dtype)


def _check(op: str, X: torch.Tensor, gates: torch.Tensor | None, site: SiteSpec) -> None:
    check_state(op, X, site.streams, site.dim)
    check_gates(op, gates, X, site)


@read.register_fake
def _(X: torch.Tensor, gates: torch.Tensor | None, spec: str) -> torch.Tensor:
    site = SiteSpec.decode(spec)
    _check("mhc::read", X, gates, site)
    return X.new_empty(narrow_shape(X.shape, site.dim))


@torch.library.custom_op("mhc::read_backward", mutates_args=())
def read_backward(
    du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor | None, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `read`.

    Args:
        du: gradient of the un-widened tensor.
        X: as given to `read`, like ``gates`` and ``spec``.
        gates: see there.
        spec: see there.

    Returns:
        Gradients of ``X`` and ``gates``, each in the dtype of its tensor; empty for what is None.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    _check("mhc::read_backward", X, gates, site)
    check_tensor("mhc::read_backward", "du", du, narrow_shape(X.shape, site.dim), X)
    weights = entry_gates(X, site) if gates is None else gates
    if kernels := launcher("mhc::read_backward", site, X, du, weights):
        dX, dgates = kernels.read_backward(du, X, weights, site)
        return dX, dgates if gates is not None else dgates.new_empty(0)
    dtype = coefficient_dtype(X)
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        g = narrow_to_tokens(du, site.dim, dtype)[:, None]
        grad_x = given_weights(weights, site, dtype)[..., None] * g
        grad_pre = torch.linalg.vecdot(x, g)
        grad_pre = grad_pre if site.dynamic else grad_pre.sum(0)
        dgates = x.new_empty(0) if gates is None else given_gradient(grad_pre, gates, site)
    return tokens_to_state(grad_x, X, site.dim), dgates


@read_backward.register_fake
def _(
    du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor | None, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    site = SiteSpec.decode(spec)
    _check("mhc::read_backward", X, gates, site)
    check_tensor("mhc::read_backward", "du", du, narrow_shape(X.shape, site.dim), X)
    empty = X.new_empty(0, dtype=coefficient_dtype(X))
    return X.new_empty(X.shape), empty if gates is None else gates.new_empty(gates.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    X, gates, ctx.spec = inputs
    ctx.save_for_backward(X, gates)


def _backward(ctx: Any, du: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    X, gates = ctx.saved_tensors
    dX, dgates = read_backward(du, X, gates, ctx.spec)
    return dX, None if gates is None else dgates, None


read.register_autograd(_backward, setup_context=_setup_context)
