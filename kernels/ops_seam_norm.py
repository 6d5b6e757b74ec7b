"""``mhc::seam_norm``: a seam that also applies the norm with which the next branch starts.

``X'`` and the mappings are those of ``mhc::seam``; in the place of u it gives ``norm(u)``, and u is
in memory at no time: a norm by itself reads it and writes a row per token forward, and moves three
rows backward.
"""

from typing import Any

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.branch_norm import STATISTICS, normalise, normalise_backward
from mhc_compile.kernels.layout import (
    SeamNormGradients,
    check_tensor,
    coefficient_dtype,
    empty_phi,
    mix,
    narrow_shape,
    narrow_to_tokens,
    state_to_tokens,
    token_shape,
    tokens_to_narrow,
)
from mhc_compile.kernels.ops_post import post
from mhc_compile.kernels.ops_pre import coefficient_shapes, read_weights
from mhc_compile.kernels.ops_seam import check_seam, check_seam_backward, seam, seam_backward
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec

Six = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("mhc::seam_norm", mutates_args=())
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
    spec: str,
) -> Six:
    """Carry the streams over one site and make the normalised input of the next branch.

    Args:
        X: the state before the first site, as for `mhc_compile.kernels.ops_seam.seam`, like the
            arguments up to ``alpha``.
        f: see there.
        h_post: see there.
        h_res: see there.
        phi: see there; sites are dynamic.
        bias: see there.
        alpha: see there.
        weight: ``[C]``, of the norm; None is 1.
        shift: ``[C]``, added at the end; None is 0.
        spec: `SiteSpec.encode`, with a ``branch_norm``.

    Returns:
        The next state; ``norm(u)`` of the un-widened shape and the dtype of ``X``, made from u as
        ``mhc::seam`` rounds it; h_post, h_res and what is saved as there; the statistics of the
        norm ``[tokens..., 1 or 2]``: 1/rms or 1/deviation, and the mean.

    Raises:
        KernelError: there is no norm to apply, the site is static or a single pass, or a shape,
            dtype or device does not fit.
    """
    op, site = "mhc::seam_norm", SiteSpec.decode(spec)
    _check(op, X, f, h_post, h_res, phi, bias, alpha, weight, shift, site)
    tensors = (h_post, h_res, phi, bias, alpha, weight, shift)
    if kernels := launcher(op, site, X, *tensors, branch=f):
        shapes = (*coefficient_shapes(X, site), _statistics_shape(X, site))
        return kernels.seam_norm(X, f, *tensors, site, shapes)
    plain = site.without_norm.encode()
    X_next, u, *mappings = seam(X, f, h_post, h_res, phi, bias, alpha, plain)
    with torch.autocast(X.device.type, enabled=False):
        rows = narrow_to_tokens(u, site.dim, coefficient_dtype(X))
        y, statistics = normalise(rows, weight, shift, site, X.dtype)
    y = tokens_to_narrow(y, u.shape, site.dim, X.dtype)
    return X_next, y, *mappings, statistics.reshape(_statistics_shape(X, site))


def _statistics_shape(X: torch.Tensor, site: SiteSpec) -> list[int]:
    return [*token_shape(X.shape, site.dim), STATISTICS[site.branch_norm]]


def _check(
    op: str,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    site: SiteSpec,
) -> None:
    _check_kind(op, site)
    check_seam(op, X, f, h_post, h_res, phi, bias, alpha, site.without_norm)
    _check_vectors(op, X, weight, shift, site)


def _check_kind(op: str, site: SiteSpec) -> None:
    if site.branch_norm == "none":
        raise KernelError(f"{op}: branch_norm='none' leaves u as it is: use mhc::seam")
    if site.single_pass or not site.dynamic:
        kind = "a single pass" if site.single_pass else "a static site"
        raise KernelError(f"{op}: {kind} does not normalise its branch input")


def _check_vectors(
    op: str,
    X: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    site: SiteSpec,
) -> None:
    for name, vector in (("weight", weight), ("shift", shift)):
        if vector is not None:
            check_tensor(op, name, vector, [X.shape[site.dim]], X)


@seam_norm.register_fake
def _(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    spec: str,
) -> Six:
    site = SiteSpec.decode(spec)
    _check("mhc::seam_norm", X, f, h_post, h_res, phi, bias, alpha, weight, shift, site)
    shapes = (*coefficient_shapes(X, site), _statistics_shape(X, site))
    h_post_next, h_res_next, saved, statistics = (
        X.new_empty(shape, dtype=coefficient_dtype(X)) for shape in shapes
    )
    y = X.new_empty(narrow_shape(X.shape, site.dim))
    return X.new_empty(X.shape), y, h_post_next, h_res_next, saved, statistics


@torch.library.custom_op("mhc::seam_norm_backward", mutates_args=())
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
    spec: str,
) -> SeamNormGradients:
    """Gradients of `seam_norm` from those of its first four outputs.

    Args:
        dX_next: gradient of the next state.
        dy: gradient of the normalised branch input.
        dh_post_next: gradient of the next site's h_post.
        dh_res_next: gradient of the next site's h_res.
        X: as given to `seam_norm`, like the arguments up to ``shift``, and ``spec``.
        f: see there.
        h_post: see there.
        h_res: see there.
        phi: see there.
        bias: see there.
        alpha: see there.
        weight: see there.
        shift: see there.
        saved: fifth output of `seam_norm`.
        statistics: sixth output of `seam_norm`.
        spec: see there.

    Returns:
        Gradients of ``X``, ``f``, ``h_post``, ``h_res``, ``phi``, ``bias``, ``alpha``, ``weight``
        and ``shift``, each in the dtype of its tensor; empty for what is None.

    Raises:
        KernelError: as for `seam_norm`.
    """
    op, site = "mhc::seam_norm_backward", SiteSpec.decode(spec)
    grads = (dX_next, dy, dh_post_next, dh_res_next)
    given = (X, f, h_post, h_res, phi, bias, alpha)
    _check_backward(op, grads, given, weight, shift, saved, statistics, site)
    tensors = (*grads, *given[2:], weight, shift, saved, statistics)
    if kernels := launcher(op, site, X, *tensors, branch=f):
        return kernels.seam_norm_backward(*grads, *given, weight, shift, saved, statistics, site)
    dtype, n, plain = coefficient_dtype(X), site.streams, site.without_norm.encode()
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(post(X, f, h_post, h_res, plain), site.dim, dtype)
        weights = read_weights(saved.flatten(0, -2), bias, alpha, site).reshape(-1, 1, n)
        u = mix(weights, x).squeeze(1).to(X.dtype).to(dtype)
        rows = narrow_to_tokens(dy, site.dim, dtype)
        given_statistics = statistics.flatten(0, -2)
        du, dweight, dshift = normalise_backward(rows, u, given_statistics, weight, site, X.dtype)
    du = tokens_to_narrow(du, dy.shape, site.dim, dtype)
    found = seam_backward(dX_next, du, dh_post_next, dh_res_next, *given, saved, plain)
    empty = X.new_empty(0, dtype=dtype)
    return (
        *found,
        empty if weight is None else dweight.to(weight.dtype),
        empty.clone() if shift is None else dshift.to(shift.dtype),
    )


def _check_backward(
    op: str,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    given: tuple[
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
    ],
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    saved: torch.Tensor,
    statistics: torch.Tensor,
    site: SiteSpec,
) -> None:
    _check_kind(op, site)
    check_seam_backward(op, grads, *given, saved, site.without_norm)
    _check_vectors(op, given[0], weight, shift, site)
    check_tensor(op, "statistics", statistics, _statistics_shape(given[0], site), given[0])


@seam_norm_backward.register_fake
def _(
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
    spec: str,
) -> SeamNormGradients:
    op, site = "mhc::seam_norm_backward", SiteSpec.decode(spec)
    grads = (dX_next, dy, dh_post_next, dh_res_next)
    given = (X, f, h_post, h_res, phi, bias, alpha)
    _check_backward(op, grads, given, weight, shift, saved, statistics, site)
    empty = X.new_empty(0, dtype=coefficient_dtype(X))
    return (
        X.new_empty(X.shape),
        f.new_empty(f.shape),
        h_post.new_empty(h_post.shape),
        h_res.new_empty(h_res.shape),
        empty_phi(phi, phi.dtype),
        bias.new_empty(bias.shape),
        alpha.new_empty(alpha.shape),
        empty if weight is None else weight.new_empty(weight.shape),
        empty.clone() if shift is None else shift.new_empty(shift.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.spec = inputs
    saved, statistics = output[4:]
    ctx.mark_non_differentiable(saved, statistics)
    ctx.save_for_backward(*tensors, saved, statistics)


def _backward(
    ctx: Any,
    dX_next: torch.Tensor,
    dy: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    *_: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *grads, dweight, dshift = seam_norm_backward(
        dX_next, dy, dh_post_next, dh_res_next, *tensors, ctx.spec
    )
    weight, shift = tensors[7:9]
    of_norm = (None if weight is None else dweight, None if shift is None else dshift)
    return (*grads, *of_norm, None)


seam_norm.register_autograd(_backward, setup_context=_setup_context)
