"""``mhc::expand`` and ``mhc::collapse``: the two ends of a widened trunk.

Expand is ``X_i = x`` for every stream i; collapse is ``x = sum_i w_i X_i`` with w = 1/n (mean),
1 (sum), or the learned head's ``sigmoid(alpha z / r + bias) + pre_eps``.
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
from mhc_compile.kernels.layout import (
    check_state,
    check_tensor,
    coefficient_dtype,
    empty_phi,
    like_phi,
    mix,
    narrow_shape,
    narrow_to_tokens,
    state_to_tokens,
    tokens_to_narrow,
    tokens_to_state,
    widened_shape,
)
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import MAX_STREAMS, SiteSpec

COLLAPSE_MODES = ("mean", "sum", "learned")
"""The ways `collapse` weighs the streams."""


@torch.library.custom_op("mhc::expand", mutates_args=())
def expand(x: torch.Tensor, streams: int, dim: int) -> torch.Tensor:
    """Replicate a tensor into every stream.

    Args:
        x: any shape and floating dtype.
        streams: number n of streams.
        dim: channel axis of ``x``, counted from the end.

    Returns:
        The state, ``x.shape`` with n inserted before axis ``dim``.

    Raises:
        KernelError: ``x`` has no such axis or is no floating point tensor, or n is out of range.
    """
    _check_expand(x, streams, dim)
    widened = x.unsqueeze(dim - 1).expand(widened_shape(x.shape, streams, dim))
    return widened.clone(memory_format=torch.contiguous_format)


def _check_expand(x: torch.Tensor, streams: int, dim: int) -> None:
    if not 1 <= streams <= MAX_STREAMS:
        raise KernelError(f"mhc::expand: {streams} streams; use 1 to {MAX_STREAMS}")
    if not -x.dim() <= dim <= -1:
        raise KernelError(
            f"mhc::expand: a tensor of shape {tuple(x.shape)} has no channel axis {dim}; count it "
            "from the end, -1 being the last"
        )
    if not x.dtype.is_floating_point:
        raise KernelError(f"mhc::expand: {x.dtype} cannot be a stream; give floating point numbers")


@expand.register_fake
def _(x: torch.Tensor, streams: int, dim: int) -> torch.Tensor:
    _check_expand(x, streams, dim)
    return x.new_empty(widened_shape(x.shape, streams, dim))


@torch.library.custom_op("mhc::expand_backward", mutates_args=())
def expand_backward(dX: torch.Tensor, dim: int) -> torch.Tensor:
    """Gradient of `expand`: the sum over the streams, rounded once.

    Args:
        dX: gradient of the state.
        dim: as given to `expand`.

    Returns:
        Gradient of ``x``.
    """
    return dX.sum(dim - 1, dtype=coefficient_dtype(dX)).to(dX.dtype).contiguous()


@expand_backward.register_fake
def _(dX: torch.Tensor, dim: int) -> torch.Tensor:
    return dX.new_empty(narrow_shape(dX.shape, dim))


def _expand_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dim = inputs[2]


def _expand_backward(ctx: Any, dX: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return expand_backward(dX, ctx.dim), None, None


expand.register_autograd(_expand_backward, setup_context=_expand_setup_context)


@torch.library.custom_op("mhc::collapse", mutates_args=())
def collapse(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    spec: str,
) -> torch.Tensor:
    """Make one tensor of all streams.

    Args:
        X: the state, ``[..., n, C]`` (`mhc_compile.kernels.layout` has the other layouts).
        phi: ``[n * C, n]`` of a dynamic learned head, else None.
        bias: ``[n]`` of a learned head, else None.
        alpha: ``[1]`` of a dynamic learned head, else None.
        mode: one of `COLLAPSE_MODES`.
        spec: `SiteSpec.encode`; ``dynamic`` says which learned head.

    Returns:
        The un-widened tensor, in the dtype of ``X``, rounded once.

    Raises:
        KernelError: a shape, dtype or device does not fit, or parameters do not fit the mode.

    Reference:
        The learned head is DeepSeek-V4's (``DeepseekV4HyperHead`` in transformers).
    """
    site = SiteSpec.decode(spec)
    _check_collapse("mhc::collapse", X, phi, bias, alpha, mode, site)
    if kernels := launcher("mhc::collapse", site, X, phi, bias, alpha):
        return kernels.collapse(X, phi, bias, alpha, mode, site)
    dtype = coefficient_dtype(X)
    if bias is None:
        out = X.sum(site.dim - 1, dtype=dtype)
        out = out / site.streams if mode == "mean" else out
        return out.to(X.dtype).contiguous()
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        _, _, h = _head(x, phi, bias, alpha, site)
        weights = gate_weights(h, 1.0, "sigmoid") + site.pre_eps
        out = mix(weights[:, None], x).squeeze(1)
    return tokens_to_narrow(out, narrow_shape(X.shape, site.dim), site.dim, X.dtype)


def _head(
    x: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    site: SiteSpec,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """What `project` saves, the normalised products (both None if static), and the logits."""
    bias = bias.to(x.dtype)
    if phi is None or alpha is None:
        return None, None, bias[None]
    saved = project(x, phi.to(x.dtype), site.norm_eps, per_stream=False)
    hidden = normalised(saved, site.streams)
    h = affine(hidden, bias, alpha.to(x.dtype), [site.streams], "sigmoid")
    return saved, hidden, h


def _check_collapse(
    op: str,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    site: SiteSpec,
) -> None:
    if mode not in COLLAPSE_MODES:
        raise KernelError(f"{op}: mode={mode!r} is not allowed: use {', '.join(COLLAPSE_MODES)}")
    check_state(op, X, site.streams, site.dim)
    learned = mode == "learned"
    if learned and site.single_pass:
        raise KernelError(f"{op}: a single pass has no learned head; mhc::read takes its weights")
    wanted = {"phi": learned and site.dynamic, "bias": learned, "alpha": learned and site.dynamic}
    n, width = site.streams, site.streams * X.shape[site.dim]
    shapes = {"phi": [width, n], "bias": [n], "alpha": [1]}
    for name, tensor in {"phi": phi, "bias": bias, "alpha": alpha}.items():
        if (tensor is not None) != wanted[name]:
            raise KernelError(
                f"{op}: {name} is {'absent' if tensor is None else 'given'}, but mode={mode!r} "
                f"with dynamic={site.dynamic} {'needs' if wanted[name] else 'does not take'} it"
            )
        if tensor is not None:
            check_tensor(op, name, tensor, shapes[name], X)


@collapse.register_fake
def _(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    spec: str,
) -> torch.Tensor:
    site = SiteSpec.decode(spec)
    _check_collapse("mhc::collapse", X, phi, bias, alpha, mode, site)
    return X.new_empty(narrow_shape(X.shape, site.dim))


@torch.library.custom_op("mhc::collapse_backward", mutates_args=())
def collapse_backward(
    dx: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a learned `collapse`.

    Args:
        dx: gradient of the un-widened tensor.
        X: as given to `collapse`, like ``phi``, ``bias``, ``alpha`` and ``spec``.
        phi: see there.
        bias: see there.
        alpha: see there.
        spec: see there.

    Returns:
        Gradients of ``X``, ``phi``, ``bias`` and ``alpha``, each in the dtype of its tensor; empty
        for what is None.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    _check_collapse("mhc::collapse_backward", X, phi, bias, alpha, "learned", site)
    check_tensor("mhc::collapse_backward", "dx", dx, narrow_shape(X.shape, site.dim), X)
    if kernels := launcher("mhc::collapse_backward", site, X, dx, phi, bias, alpha):
        return kernels.collapse_backward(dx, X, phi, bias, alpha, site)
    dtype = coefficient_dtype(X)
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        g = narrow_to_tokens(dx, site.dim, dtype)
        saved, hidden, h = _head(x, phi, bias, alpha, site)
        grad_x = (gate_weights(h, 1.0, "sigmoid") + site.pre_eps)[..., None] * g[:, None]
        grad_weights = torch.linalg.vecdot(x, g[:, None])
        if saved is None or hidden is None or phi is None or alpha is None:
            grad_weights = grad_weights.sum(0, keepdim=True)
            grad_bias = gate_weights_backward(grad_weights, h, 1.0, "sigmoid")[0]
            grad_phi, grad_alpha = x.new_empty(0), x.new_empty(0)
        else:
            grad_h = gate_weights_backward(grad_weights, h, 1.0, "sigmoid")
            grad_hidden, grad_bias, grad_alpha = affine_backward(
                grad_h, hidden, alpha.to(dtype), [site.streams], "sigmoid"
            )
            through_phi, grad_z = project_backward(
                grad_hidden, saved, x, phi.to(dtype), per_stream=False
            )
            grad_x = grad_x + through_phi
            grad_phi = like_phi(phi_gradient(grad_z, x, per_stream=False), phi)
            grad_alpha = grad_alpha.to(alpha.dtype)
    return tokens_to_state(grad_x, X, site.dim), grad_phi, grad_bias.to(bias.dtype), grad_alpha


@collapse_backward.register_fake
def _(
    dx: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    site = SiteSpec.decode(spec)
    _check_collapse("mhc::collapse_backward", X, phi, bias, alpha, "learned", site)
    check_tensor("mhc::collapse_backward", "dx", dx, narrow_shape(X.shape, site.dim), X)
    empty = X.new_empty(0, dtype=coefficient_dtype(X))
    return (
        X.new_empty(X.shape),
        empty if phi is None else empty_phi(phi, phi.dtype),
        bias.new_empty(bias.shape),
        empty.clone() if alpha is None else alpha.new_empty(alpha.shape),
    )


def _collapse_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.mode, ctx.spec = inputs
    # A mean or a sum needs nothing for its backward; keeping the state alive would cost n C.
    ctx.save_for_backward(*(tensors if ctx.mode == "learned" else ()))


def _collapse_backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.mode == "learned":
        X, phi, bias, alpha = ctx.saved_tensors
        dX, dphi, dbias, dalpha = collapse_backward(dx, X, phi, bias, alpha, ctx.spec)
        static = phi is None
        return dX, None if static else dphi, dbias, None if static else dalpha, None, None
    site = SiteSpec.decode(ctx.spec)
    share = dx / site.streams if ctx.mode == "mean" else dx
    return expand(share, site.streams, site.dim), None, None, None, None, None


collapse.register_autograd(_collapse_backward, setup_context=_collapse_setup_context)
