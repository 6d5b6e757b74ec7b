"""``mhc::seam``: leave one site and enter the next, the state read once and written once.

``X' = post(X, f, h_post, h_res)``, then ``u', h_post', h_res' = pre(X', phi', bias', alpha')``.
Fused kernels move 2 n + 2 rows of C per token forward, where the two ops apart move 3 n + 2 at
least, and 3 n + 3 backward: X' is made again from X and f, and its gradients are summed on the way.
"""

from typing import Any

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.layout import (
    SeamGradients,
    check_tensor,
    coefficient_dtype,
    empty_phi,
    narrow_shape,
)
from mhc_compile.kernels.ops_post import check_post, post, post_backward
from mhc_compile.kernels.ops_pre import check_pre, coefficient_shapes, pre, pre_backward
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


@torch.library.custom_op("mhc::seam", mutates_args=())
def seam(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carry the streams over one site and read the input of the next branch out of them.

    Args:
        X: the state before the first site, ``[..., n, C]`` (or another layout, as for `post`).
        f: its branch output.
        h_post: its second mapping.
        h_res: its third mapping, [out, in].
        phi: parameters of the next site, as for `pre`, like ``bias`` and ``alpha``.
        bias: see there.
        alpha: see there.
        spec: `SiteSpec.encode`, the same for both sites. In a single pass the next site reads the
            streams with the H_pre in ``h_post``.

    Returns:
        The next state, and what `pre` gives for it: u, h_post, h_res and what it saves.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    check_seam("mhc::seam", X, f, h_post, h_res, phi, bias, alpha, site)
    if kernels := launcher("mhc::seam", site, X, h_post, h_res, phi, bias, alpha, branch=f):
        shapes = coefficient_shapes(X, site)
        return kernels.seam(X, f, h_post, h_res, phi, bias, alpha, site, shapes)
    X_next = post(X, f, h_post, h_res, spec)
    return (X_next, *pre(X_next, phi, bias, alpha, spec, h_post if site.single_pass else None))


def check_seam(
    op: str,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    site: SiteSpec,
) -> None:
    """Refuse arguments of `seam` that do not fit each other."""
    if site.branch_norm != "none":
        raise KernelError(f"{op}: branch_norm={site.branch_norm!r} is for mhc::seam_norm")
    check_post(op, X, f, h_post, h_res, site)
    check_pre(op, X, phi, bias, alpha, site)


@seam.register_fake
def _(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    site = SiteSpec.decode(spec)
    check_seam("mhc::seam", X, f, h_post, h_res, phi, bias, alpha, site)
    h_post_next, h_res_next, saved = (
        X.new_empty(shape, dtype=coefficient_dtype(X)) for shape in coefficient_shapes(X, site)
    )
    u = X.new_empty(narrow_shape(X.shape, site.dim))
    return X.new_empty(X.shape), u, h_post_next, h_res_next, saved


@torch.library.custom_op("mhc::seam_backward", mutates_args=())
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
    spec: str,
) -> SeamGradients:
    """Gradients of `seam` from those of its first four outputs.

    Args:
        dX_next: gradient of the next state.
        du: gradient of the next branch input.
        dh_post_next: gradient of the next site's h_post.
        dh_res_next: gradient of the next site's h_res.
        X: as given to `seam`, like the arguments up to ``alpha``, and ``spec``.
        f: see there.
        h_post: see there.
        h_res: see there.
        phi: see there.
        bias: see there.
        alpha: see there.
        saved: fifth output of `seam`.
        spec: see there.

    Returns:
        Gradients of ``X``, ``f``, ``h_post``, ``h_res``, ``phi``, ``bias`` and ``alpha``, each in
        the dtype of its tensor; empty for what is None.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    op, site = "mhc::seam_backward", SiteSpec.decode(spec)
    grads = (dX_next, du, dh_post_next, dh_res_next)
    check_seam_backward(op, grads, X, f, h_post, h_res, phi, bias, alpha, saved, site)
    tensors = (*grads, h_post, h_res, phi, bias, alpha, saved)
    if kernels := launcher(op, site, X, *tensors, branch=f):
        return kernels.seam_backward(*grads, X, f, h_post, h_res, phi, bias, alpha, saved, site)
    X_next = post(X, f, h_post, h_res, spec)
    gates = h_post if site.single_pass else None
    dX, dphi, dbias, dalpha, dgates = pre_backward(
        du, dh_post_next, dh_res_next, X_next, phi, bias, alpha, saved, spec, gates=gates
    )
    dX, df, dh_post, dh_res = post_backward(dX.add_(dX_next), X, f, h_post, h_res, spec)
    dh_post = dh_post if gates is None else dh_post.add_(dgates)
    return dX, df, dh_post, dh_res, dphi, dbias, dalpha


def check_seam_backward(
    op: str,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    site: SiteSpec,
) -> None:
    """Refuse arguments of `seam_backward` that do not fit each other."""
    check_seam(op, X, f, h_post, h_res, phi, bias, alpha, site)
    named = {"dX_next": grads[0], "du": grads[1], "dh_post_next": grads[2]}
    named |= {"dh_res_next": grads[3], "saved": saved}
    shapes = (X.shape, narrow_shape(X.shape, site.dim), *coefficient_shapes(X, site))
    for (name, tensor), shape in zip(named.items(), shapes, strict=True):
        check_tensor(op, name, tensor, shape, X)


@seam_backward.register_fake
def _(
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
    spec: str,
) -> SeamGradients:
    grads = (dX_next, du, dh_post_next, dh_res_next)
    op, site = "mhc::seam_backward", SiteSpec.decode(spec)
    check_seam_backward(op, grads, X, f, h_post, h_res, phi, bias, alpha, saved, site)
    empty = X.new_empty(0, dtype=coefficient_dtype(X))
    return (
        X.new_empty(X.shape),
        f.new_empty(f.shape),
        h_post.new_empty(h_post.shape),
        h_res.new_empty(h_res.shape),
        empty if phi is None else empty_phi(phi, phi.dtype),
        bias.new_empty(bias.shape),
        empty.clone() if alpha is None else alpha.new_empty(alpha.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.spec = inputs
    saved = output[4]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(*tensors, saved)


def _backward(
    ctx: Any,
    dX_next: torch.Tensor,
    du: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    _: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *grads, dphi, dbias, dalpha = seam_backward(
        dX_next, du, dh_post_next, dh_res_next, *tensors, ctx.spec
    )
    static = tensors[4] is None
    return (*grads, None if static else dphi, dbias, None if static else dalpha, None)


seam.register_autograd(_backward, setup_context=_setup_context)
