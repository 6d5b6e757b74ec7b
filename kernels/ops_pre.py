"""``mhc::pre``: read a branch input out of the streams and make the site's mappings.

With equation numbers of arXiv 2512.24880:

(14) to (16): ``z = vec(X) phi``, ``r = rms(vec(X))``, ``h = alpha z / r + bias``;
(17) to (19): ``H_pre = sigmoid(h_pre)``, ``H_post = 2 sigmoid(h_post)``, ``H_res`` from h_res by
the constraint; then ``u = sum_i H_pre[i] X_i``.

In a single pass H_pre is that of the site before, which came along in front of its H_post: nothing
that is computed here has to be waited for, and one read of X makes everything.
"""

from typing import Any

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.coefficients import (
    affine,
    affine_backward,
    gate_weights,
    gate_weights_backward,
    normalised,
    phi_gradient,
    project,
    project_backward,
)
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.constraints.base import Constraint
from mhc_compile.kernels.layout import (
    PreGradients,
    check_state,
    check_tensor,
    coefficient_dtype,
    empty_phi,
    like_phi,
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

Shapes = tuple[list[int], list[int], list[int]]


def _groups(site: SiteSpec, constraint: Constraint) -> list[int]:
    return [site.streams, site.streams, constraint.logits(site.streams)]


def check_pre(
    op: str,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    site: SiteSpec,
) -> None:
    """Refuse arguments of `pre` that do not fit each other."""
    constraint = constraint_of(site)
    check_state(op, X, site.streams, site.dim)
    check_tensor(op, "bias", bias, [sum(_groups(site, constraint))], X)
    if (phi is None) != (alpha is None) or site.dynamic != (phi is not None):
        raise KernelError(
            f"{op}: phi is {'absent' if phi is None else 'given'}, alpha "
            f"{'absent' if alpha is None else 'given'} and the specification says "
            f"dynamic={site.dynamic}; dynamic mappings take both, static ones neither"
        )
    if phi is not None and alpha is not None:
        check_tensor(op, "phi", phi, phi_shape(X, site), X)
        check_tensor(op, "alpha", alpha, [3], X)


def phi_shape(X: torch.Tensor, site: SiteSpec) -> list[int]:
    """Shape of the phi of a dynamic site."""
    n, channels, constraint = site.streams, X.shape[site.dim], constraint_of(site)
    width = sum(_groups(site, constraint))
    return [channels, width // n] if constraint.per_stream else [n * channels, width]


def coefficient_shapes(X: torch.Tensor, site: SiteSpec) -> Shapes:
    """Shapes of h_post, h_res and saved."""
    n, constraint = site.streams, constraint_of(site)
    if not site.dynamic:
        return [site.gates], [n, n], [0]
    tokens = token_shape(X.shape, site.dim)
    norms = n if constraint.per_stream else 1
    mixed_tokens = tokens if constraint.mixes else []
    saved = [*tokens, sum(_groups(site, constraint)) + norms]
    return [*tokens, site.gates], [*mixed_tokens, n, n], saved


def check_gates(op: str, gates: torch.Tensor | None, X: torch.Tensor, site: SiteSpec) -> None:
    """Refuse the mappings of the site before where nothing reads them, or they do not fit."""
    if gates is None:
        return
    if not site.single_pass:
        raise KernelError(f"{op}: gates are given, but the specification says single_pass=False")
    check_tensor(op, "gates", gates, coefficient_shapes(X, site)[0], X)


def entry_gates(X: torch.Tensor, site: SiteSpec) -> torch.Tensor:
    """The gates before the first site of a trunk: it reads the first stream."""
    gates = X.new_zeros(coefficient_shapes(X, site)[0], dtype=coefficient_dtype(X))
    gates[..., 0] = 1.0
    return gates


@torch.library.custom_op("mhc::pre", mutates_args=())
def pre(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
    gates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-mix the streams and compute the mappings of one site.

    Args:
        X: the state, ``[..., n, C]`` (`mhc_compile.kernels.layout` has the other layouts).
        phi: ``[n * C, m]`` with columns [pre n | post n | res k], res row-major [out, in]; for a
            ``per_stream`` constraint ``[C, n + 2]``, columns [pre, post, res of each out]. None for
            static mappings. Its transpose may be what is dense, and is in its gradient then.
        bias: ``[m]``, ``m = 2 n + k``, in that order.
        alpha: ``[3]``, the scales of pre, post and res; None for static mappings.
        spec: `SiteSpec.encode`.
        gates: in a single pass the ``h_post`` of the site before; None at the first site of a
            trunk, where u is the first stream.

    Returns:
        ``u`` of the un-widened shape and the dtype of ``X``; ``h_post`` ``[tokens..., n]`` and
        ``h_res`` ``[tokens..., n, n]`` [out, in], float32 (float64 if ``X`` is), without the token
        axes if static, ``h_res`` also if the constraint does not mix; ``saved``
        ``[tokens..., p]``, z and 1/r for the backward, empty if static. In a single pass ``h_post``
        is ``[tokens..., 2 n]``, H_pre (for the next site) before H_post.

    Raises:
        KernelError: a shape, dtype or device does not fit, or the constraint refuses n.
    """
    site = SiteSpec.decode(spec)
    check_pre("mhc::pre", X, phi, bias, alpha, site)
    check_gates("mhc::pre", gates, X, site)
    if site.single_pass and gates is None:
        gates = entry_gates(X, site)
    if kernels := launcher("mhc::pre", site, X, phi, bias, alpha, gates):
        return kernels.pre(X, phi, bias, alpha, site, coefficient_shapes(X, site), gates)
    constraint, dtype = constraint_of(site), coefficient_dtype(X)
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        saved = x.new_empty(0)
        if phi is not None:
            saved = project(x, phi.to(dtype), site.norm_eps, constraint.per_stream)
        _, (_, post_logits, res_logits) = _logits(saved, bias, alpha, site)
        h_pre = read_weights(saved, bias, alpha, site)
        h_post = gate_weights(post_logits, 2.0, constraint.gate)
        h_res = constraint.matrix(res_logits, site)
        if gates is not None:
            h_post = torch.cat((h_pre, h_post), -1)
            h_pre = given_weights(gates, site, dtype)
        u = mix(h_pre[:, None], x).squeeze(1)
    post_shape, res_shape, saved_shape = coefficient_shapes(X, site)
    return (
        tokens_to_narrow(u, narrow_shape(X.shape, site.dim), site.dim, X.dtype),
        # Static and unconstrained mappings can be views of the bias; an op's outputs must not be.
        h_post.reshape(post_shape).clone(memory_format=torch.contiguous_format),
        h_res.reshape(res_shape).clone(memory_format=torch.contiguous_format),
        saved.reshape(saved_shape),
    )


def given_weights(gates: torch.Tensor, site: SiteSpec, dtype: torch.dtype) -> torch.Tensor:
    """H_pre of the site before, ``[T or 1, n]``."""
    return gates.to(dtype).reshape(-1, site.gates)[:, : site.streams]


def _logits(
    saved: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor | None, site: SiteSpec
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """The normalised products (None if static), and pre, post and res logits ``[T or 1, .]``."""
    constraint = constraint_of(site)
    groups = _groups(site, constraint)
    bias = bias.to(saved.dtype)
    if alpha is None:
        return None, torch.split(bias[None], groups, -1)
    hidden = normalised(saved, sum(groups))
    h = affine(hidden, bias, alpha.to(saved.dtype), groups, constraint.gate)
    pre_logits, post_logits, res_logits = torch.split(h, groups, -1)
    # Without mixing there is one h_res for all tokens.
    return hidden, (pre_logits, post_logits, res_logits if constraint.mixes else bias[None, :0])


def read_weights(
    saved: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor | None, site: SiteSpec
) -> torch.Tensor:
    """H_pre ``[T or 1, n]``, equation (17), from what `pre` saved ``[T, p]``."""
    _, (logits, _, _) = _logits(saved, bias, alpha, site)
    return gate_weights(logits, 1.0, constraint_of(site).gate) + site.pre_eps


@pre.register_fake
def _(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
    gates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    site = SiteSpec.decode(spec)
    check_pre("mhc::pre", X, phi, bias, alpha, site)
    check_gates("mhc::pre", gates, X, site)
    h_post, h_res, saved = (
        X.new_empty(shape, dtype=coefficient_dtype(X)) for shape in coefficient_shapes(X, site)
    )
    return X.new_empty(narrow_shape(X.shape, site.dim)), h_post, h_res, saved


@torch.library.custom_op("mhc::pre_backward", mutates_args=())
def pre_backward(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    spec: str,
    dX_more: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> PreGradients:
    """Gradients of `pre` from those of its first three outputs; reads the state once.

    Args:
        du: gradient of ``u``.
        dh_post: gradient of ``h_post``.
        dh_res: gradient of ``h_res``.
        X: as given to `pre`, like ``phi``, ``bias``, ``alpha`` and ``spec``.
        phi: see there.
        bias: see there.
        alpha: see there.
        saved: fourth output of `pre`.
        spec: see there.
        dX_more: what ``X`` gets from its other readers, added to the gradient of ``X``; as an
            argument it saves a pass over three states.
        gates: as given to `pre`.

    Returns:
        Gradients of ``X``, ``phi``, ``bias``, ``alpha`` and ``gates``, each in the dtype of its
        tensor; empty for what is None.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    op = "mhc::pre_backward"
    check_pre_backward(op, du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    check_gates(op, gates, X, site)
    is_entry = gates is None
    if site.single_pass and gates is None:
        gates = entry_gates(X, site)
    given = (du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    tensors = (du, dh_post, dh_res, phi, bias, alpha, saved, dX_more, gates)
    if kernels := launcher(op, site, X, *tensors):
        dX, dphi, dbias, dalpha, dgates = kernels.pre_backward(*given, gates=gates)
    else:
        dX, grad_z, dbias, dalpha, dgates = gradients_but_phi(*given, gates)
        dphi = grad_z if phi is None else gradient_of_phi(grad_z, X, phi, site)
    return dX, dphi, dbias, dalpha, dgates.new_empty(0) if is_entry else dgates


def gradients_but_phi(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    site: SiteSpec,
    dX_more: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> PreGradients:
    """`pre_backward` in plain torch, with the gradient of z ``[T, m]`` in place of that of phi.

    Both are empty for a static site. A single pass has gates, be it at its entry.
    """
    constraint, dtype = constraint_of(site), coefficient_dtype(X)
    n, groups = site.streams, _groups(site, constraint)
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        g = narrow_to_tokens(du, site.dim, dtype)
        flat_saved = saved.reshape(x.shape[0], saved.shape[-1]) if site.dynamic else saved
        hidden, (pre_logits, post_logits, res_logits) = _logits(flat_saved, bias, alpha, site)

        h_pre = gate_weights(pre_logits, 1.0, constraint.gate) + site.pre_eps
        if gates is not None:
            h_pre = given_weights(gates, site, dtype)
        grad_x = h_pre[..., None] * g[:, None]
        grad_pre = torch.linalg.vecdot(x, g[:, None])
        if hidden is None:
            grad_pre = grad_pre.sum(0, keepdim=True)
        grad_post, grad_gates = dh_post.to(dtype).reshape(-1, site.gates), x.new_empty(0)
        if gates is not None:
            grad_gates = given_gradient(grad_pre, gates, site)
            grad_pre, grad_post = grad_post.tensor_split(2, -1)
        grad_res = constraint.matrix_backward(dh_res.to(dtype).reshape(-1, n, n), res_logits, site)
        grad_h = torch.cat(
            (
                gate_weights_backward(grad_pre, pre_logits, 1.0, constraint.gate),
                gate_weights_backward(grad_post, post_logits, 2.0, constraint.gate),
                grad_res if constraint.mixes else grad_pre[:, :0],
            ),
            -1,
        )
        if hidden is None or phi is None or alpha is None:
            grad_z, grad_bias, grad_alpha = x.new_empty(0), grad_h[0], x.new_empty(0)
        else:
            grad_hidden, grad_bias, grad_alpha = affine_backward(
                grad_h, hidden, alpha.to(dtype), groups, constraint.gate
            )
            through_phi, grad_z = project_backward(
                grad_hidden, flat_saved, x, phi.to(dtype), constraint.per_stream
            )
            grad_x = grad_x + through_phi
            grad_alpha = grad_alpha.to(alpha.dtype)
        if dX_more is not None:
            grad_x = grad_x + state_to_tokens(dX_more, site.dim, dtype)
    return (
        tokens_to_state(grad_x, X, site.dim),
        grad_z,
        grad_bias.to(bias.dtype),
        grad_alpha,
        grad_gates,
    )


def given_gradient(grad_pre: torch.Tensor, gates: torch.Tensor, site: SiteSpec) -> torch.Tensor:
    """The gradient of gates from that of the weights in them; their H_post is read by the post."""
    grad = torch.nn.functional.pad(grad_pre, (0, site.streams))
    return grad.reshape(gates.shape).to(gates.dtype)


def gradient_of_phi(
    grad_z: torch.Tensor, X: torch.Tensor, phi: torch.Tensor, site: SiteSpec
) -> torch.Tensor:
    """The rest of `gradients_but_phi`."""
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, coefficient_dtype(X))
        return like_phi(phi_gradient(grad_z, x, constraint_of(site).per_stream), phi)


def check_pre_backward(
    op: str,
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    site: SiteSpec,
    dX_more: torch.Tensor | None,
) -> None:
    """Refuse arguments of `pre_backward` that do not fit each other."""
    check_pre(op, X, phi, bias, alpha, site)
    check_tensor(op, "du", du, narrow_shape(X.shape, site.dim), X)
    named = {"dh_post": dh_post, "dh_res": dh_res, "saved": saved}
    for (name, tensor), shape in zip(named.items(), coefficient_shapes(X, site), strict=True):
        check_tensor(op, name, tensor, shape, X)
    if dX_more is not None:
        check_tensor(op, "dX_more", dX_more, X.shape, X)


@pre_backward.register_fake
def _(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    spec: str,
    dX_more: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> PreGradients:
    op, site = "mhc::pre_backward", SiteSpec.decode(spec)
    check_pre_backward(op, du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    check_gates(op, gates, X, site)
    empty = X.new_empty(0, dtype=coefficient_dtype(X))
    return (
        X.new_empty(X.shape),
        empty if phi is None else empty_phi(phi, phi.dtype),
        bias.new_empty(bias.shape),
        empty.clone() if alpha is None else alpha.new_empty(alpha.shape),
        empty.clone() if gates is None else gates.new_empty(gates.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    X, phi, bias, alpha, ctx.spec, gates = inputs
    saved = output[3]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(X, phi, bias, alpha, saved, gates)


def _backward(
    ctx: Any, du: torch.Tensor, dh_post: torch.Tensor, dh_res: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    *tensors, gates = ctx.saved_tensors
    grads = pre_backward(du, dh_post, dh_res, *tensors, ctx.spec, gates=gates)
    dX, dphi, dbias, dalpha, dgates = grads
    static, is_entry = tensors[1] is None, gates is None
    dphi, dalpha = (None, None) if static else (dphi, dalpha)
    return dX, dphi, dbias, dalpha, None, None if is_entry else dgates


pre.register_autograd(_backward, setup_context=_setup_context)
