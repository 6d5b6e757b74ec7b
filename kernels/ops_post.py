"""``mhc::post``: mix the streams and write a branch output into them.

``X'_i = sum_j H_res[i, j] X_j + H_post[i] f``, with one rounding at the end.
"""

from typing import Any

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import (
    check_state,
    check_tensor,
    coefficient_dtype,
    mix,
    narrow_shape,
    narrow_to_tokens,
    state_to_tokens,
    token_shape,
    tokens_to_narrow,
    tokens_to_state,
)
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


def check_post(
    op: str,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    site: SiteSpec,
) -> None:
    """Refuse arguments of `post` that do not fit each other."""
    constraint = constraint_of(site)
    check_state(op, X, site.streams, site.dim)
    check_tensor(op, "the branch output", f, narrow_shape(X.shape, site.dim), X)
    n, tokens = site.streams, token_shape(X.shape, site.dim) if site.dynamic else []
    check_tensor(op, "h_post", h_post, [*tokens, site.gates], X)
    check_tensor(op, "h_res", h_res, [*(tokens if constraint.mixes else []), n, n], X)


@torch.library.custom_op("mhc::post", mutates_args=())
def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: str
) -> torch.Tensor:
    """Carry the streams over one site.

    Args:
        X: the state, ``[..., n, C]`` (`mhc_compile.kernels.layout` has the other layouts).
        f: the branch output, of the un-widened shape, any floating dtype.
        h_post: second output of ``mhc::pre``; where it holds H_pre as well, that is not read.
        h_res: third output of ``mhc::pre``, [out, in]; not read if the constraint does not mix.
        spec: `SiteSpec.encode`.

    Returns:
        The next state, in the shape and dtype of ``X``, rounded once.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    check_post("mhc::post", X, f, h_post, h_res, site)
    if kernels := launcher("mhc::post", site, X, h_post, h_res, branch=f):
        return kernels.post(X, f, h_post, h_res, site)
    dtype, n = coefficient_dtype(X), site.streams
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        branch = narrow_to_tokens(f, site.dim, dtype)
        carried = mix(h_res.to(dtype).reshape(-1, n, n), x) if constraint_of(site).mixes else x
        weights = h_post[..., -n:].to(dtype).reshape(-1, n, 1)
        out = torch.addcmul(carried, weights, branch[:, None])
    return tokens_to_state(out, X, site.dim)


@post.register_fake
def _(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: str
) -> torch.Tensor:
    check_post("mhc::post", X, f, h_post, h_res, SiteSpec.decode(spec))
    return X.new_empty(X.shape)


@torch.library.custom_op("mhc::post_backward", mutates_args=())
def post_backward(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `post`.

    Args:
        dY: gradient of the next state.
        X: as given to `post`, like ``f``, ``h_post``, ``h_res`` and ``spec``.
        f: see there.
        h_post: see there.
        h_res: see there.
        spec: see there.

    Returns:
        Gradients of ``X``, ``f``, ``h_post`` and ``h_res``, each in the dtype of its tensor. That
        of ``h_res`` is zero if the constraint does not mix.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    check_post_backward("mhc::post_backward", dY, X, f, h_post, h_res, site)
    if kernels := launcher("mhc::post_backward", site, X, dY, h_post, h_res, branch=f):
        return kernels.post_backward(dY, X, f, h_post, h_res, site)
    dX, dh_post, dh_res = gradients_but_branch(dY, X, f, h_post, h_res, site)
    return dX, gradient_of_branch(dY, h_post, f.dtype, site), dh_post, dh_res


def gradient_of_branch(
    dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, site: SiteSpec
) -> torch.Tensor:
    """The gradient of the branch output, in plain torch."""
    exact, n = coefficient_dtype(dY), site.streams
    with torch.autocast(dY.device.type, enabled=False):
        g = state_to_tokens(dY, site.dim, exact)
        grad = mix(h_post[..., -n:].to(exact).reshape(-1, 1, n), g).squeeze(1)
    return tokens_to_narrow(grad, narrow_shape(dY.shape, site.dim), site.dim, dtype)


def gradients_but_branch(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    site: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the state and of both mappings, in plain torch."""
    dtype, n, static = coefficient_dtype(X), site.streams, not site.dynamic
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        g = state_to_tokens(dY, site.dim, dtype)
        branch = narrow_to_tokens(f, site.dim, dtype)
        grad_post = torch.linalg.vecdot(g, branch[:, None])
        if constraint_of(site).mixes:
            grad_x = mix(h_res.to(dtype).reshape(-1, n, n).mT, g)
            grad_res = torch.bmm(g, x.mT)
            grad_res = grad_res.sum(0) if static else grad_res
        else:
            grad_x, grad_res = g, torch.zeros_like(h_res)
        grad_post = grad_post.sum(0) if static else grad_post
        grad_post = torch.nn.functional.pad(grad_post, (site.gates - n, 0))
    state = tokens_to_state(grad_x, X, site.dim)
    return (
        state.clone() if grad_x is g else state,  # an op's output must not be its input
        grad_post.reshape(h_post.shape).to(h_post.dtype),
        grad_res.reshape(h_res.shape).to(h_res.dtype),
    )


def check_post_backward(
    op: str,
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    site: SiteSpec,
) -> None:
    """Refuse arguments of `post_backward` that do not fit each other."""
    check_post(op, X, f, h_post, h_res, site)
    check_tensor(op, "dY", dY, X.shape, X)


@post_backward.register_fake
def _(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_post_backward("mhc::post_backward", dY, X, f, h_post, h_res, SiteSpec.decode(spec))
    return (
        X.new_empty(X.shape),
        f.new_empty(f.shape),
        h_post.new_empty(h_post.shape),
        h_res.new_empty(h_res.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dY: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*post_backward(dY, *ctx.saved_tensors, ctx.spec), None)


post.register_autograd(_backward, setup_context=_setup_context)
