"""The backward ops in parts, so that one of them can wait.

    dX, dphi, ... = pre_backward(...)
        ->   dX, dz, ... = pre_backward_dz(...);   dphi = phi_backward(dz, X)
    dX, df, ... = post_backward(...)
        ->   df = post_backward_branch(dX');   dX, ... = post_backward_state(dX', X, f)

The gradient of phi is a third of the products that the backward of a projection makes, and nothing
but the optimizer asks for it: it is made from the gradient of z = vec(X) phi. The gradient of the
branch output is all that the branch waits for, and takes n + 1 of 3 n + 2 rows of memory traffic.
What is left of either can run while a collective of the branch is pending. Generated kernels give
the bits of the whole ops. None of these ops is differentiable.
"""

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import (
    SeamGradients,
    check_state,
    check_tensor,
    coefficient_dtype,
    dz_width,
    empty_phi,
    narrow_shape,
    token_shape,
)
from mhc_compile.kernels.ops_post import (
    check_post,
    check_post_backward,
    gradient_of_branch,
    gradients_but_branch,
    post,
    post_backward,
)
from mhc_compile.kernels.ops_pre import (
    check_pre_backward,
    coefficient_shapes,
    gradient_of_phi,
    gradients_but_phi,
    phi_shape,
)
from mhc_compile.kernels.ops_seam import check_seam_backward
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


def _check_dynamic(op: str, site: SiteSpec) -> None:
    if not site.dynamic:
        raise KernelError(f"{op}: a static site has no phi; its backward cannot be taken apart")
    if site.single_pass:
        raise KernelError(f"{op}: the backward of a single pass is not taken apart")


def _dz_shape(X: torch.Tensor, site: SiteSpec) -> list[int]:
    *tokens, saved = coefficient_shapes(X, site)[2]
    return [*tokens, dz_width(saved, site.streams)]


@torch.library.custom_op("mhc::pre_backward_dz", mutates_args=())
def pre_backward_dz(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    saved: torch.Tensor,
    spec: str,
    dX_more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre_backward`` without the gradient of phi.

    Args:
        du: as for `mhc_compile.kernels.ops_pre.pre_backward`, like the others.
        dh_post: see there.
        dh_res: see there.
        X: see there.
        phi: see there.
        bias: see there.
        alpha: see there.
        saved: see there.
        spec: see there.
        dX_more: see there.

    Returns:
        The gradient of ``X``; dz ``[tokens..., p]``, in its first m columns the gradient of z in
        float32 (float64 if ``X`` is), the others unspecified (p is
        `mhc_compile.kernels.layout.dz_width`); the gradients of ``bias`` and ``alpha``.

    Raises:
        KernelError: the site is static or a single pass; a shape, dtype or device does not fit.
    """
    op, site = "mhc::pre_backward_dz", SiteSpec.decode(spec)
    _check_dynamic(op, site)
    check_pre_backward(op, du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    given = (du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    tensors = (du, dh_post, dh_res, phi, bias, alpha, saved)
    if kernels := launcher(op, site, X, *tensors, dX_more):
        dX, dz, dbias, dalpha, _ = kernels.pre_backward(*given, with_dz=True)
        return dX, dz, dbias, dalpha
    dX, grad_z, dbias, dalpha, _ = gradients_but_phi(*given)
    return dX, _widened(grad_z, X, site), dbias, dalpha


def _widened(grad_z: torch.Tensor, X: torch.Tensor, site: SiteSpec) -> torch.Tensor:
    """``[T, m]`` as the kernels have it."""
    *tokens, width = _dz_shape(X, site)
    padded = torch.nn.functional.pad(grad_z, (0, width - grad_z.shape[-1]))
    return padded.reshape(*tokens, width)


@pre_backward_dz.register_fake
def _(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    saved: torch.Tensor,
    spec: str,
    dX_more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    op, site = "mhc::pre_backward_dz", SiteSpec.decode(spec)
    _check_dynamic(op, site)
    check_pre_backward(op, du, dh_post, dh_res, X, phi, bias, alpha, saved, site, dX_more)
    dz = X.new_empty(_dz_shape(X, site), dtype=coefficient_dtype(X))
    return X.new_empty(X.shape), dz, bias.new_empty(bias.shape), alpha.new_empty(alpha.shape)


@torch.library.custom_op("mhc::seam_backward_dz", mutates_args=())
def seam_backward_dz(
    dX_next: torch.Tensor,
    du: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    saved: torch.Tensor,
    spec: str,
) -> SeamGradients:
    """``mhc::seam_backward`` without the gradient of phi.

    Args:
        dX_next: as for `mhc_compile.kernels.ops_seam.seam_backward`, like the others.
        du: see there.
        dh_post_next: see there.
        dh_res_next: see there.
        X: see there.
        f: see there.
        h_post: see there.
        h_res: see there.
        phi: see there.
        bias: see there.
        alpha: see there.
        saved: see there.
        spec: see there.

    Returns:
        Gradients of ``X``, ``f``, ``h_post`` and ``h_res``, dz as of `pre_backward_dz`, gradients
        of ``bias`` and ``alpha``.

    Raises:
        KernelError: the site is static or a single pass; a shape, dtype or device does not fit.
    """
    op, site = "mhc::seam_backward_dz", SiteSpec.decode(spec)
    _check_dynamic(op, site)
    grads = (dX_next, du, dh_post_next, dh_res_next)
    check_seam_backward(op, grads, X, f, h_post, h_res, phi, bias, alpha, saved, site)
    tensors = (*grads, h_post, h_res, phi, bias, alpha, saved)
    if kernels := launcher(op, site, X, *tensors, branch=f):
        return kernels.seam_backward(
            *grads, X, f, h_post, h_res, phi, bias, alpha, saved, site, with_dz=True
        )
    X_next = post(X, f, h_post, h_res, spec)
    dX, dz, dbias, dalpha = pre_backward_dz(
        du, dh_post_next, dh_res_next, X_next, phi, bias, alpha, saved, spec
    )
    return (*post_backward(dX.add_(dX_next), X, f, h_post, h_res, spec), dz, dbias, dalpha)


@seam_backward_dz.register_fake
def _(
    dX_next: torch.Tensor,
    du: torch.Tensor,
    dh_post_next: torch.Tensor,
    dh_res_next: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    saved: torch.Tensor,
    spec: str,
) -> SeamGradients:
    op, site = "mhc::seam_backward_dz", SiteSpec.decode(spec)
    _check_dynamic(op, site)
    grads = (dX_next, du, dh_post_next, dh_res_next)
    check_seam_backward(op, grads, X, f, h_post, h_res, phi, bias, alpha, saved, site)
    return (
        X.new_empty(X.shape),
        f.new_empty(f.shape),
        h_post.new_empty(h_post.shape),
        h_res.new_empty(h_res.shape),
        X.new_empty(_dz_shape(X, site), dtype=coefficient_dtype(X)),
        bias.new_empty(bias.shape),
        alpha.new_empty(alpha.shape),
    )


@torch.library.custom_op("mhc::phi_backward", mutates_args=())
def phi_backward(
    dz: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor | None,
    h_post: torch.Tensor | None,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    spec: str,
) -> torch.Tensor:
    """The gradient of phi that `pre_backward_dz` and `seam_backward_dz` leave out.

    Args:
        dz: second result of the one, or fifth of the other.
        X: the state as given to that op.
        f: the branch output if it was the seam's, like ``h_post`` and ``h_res``; None otherwise.
        h_post: see there.
        h_res: see there.
        phi: tells shape and dtype.
        spec: `SiteSpec.encode`.

    Returns:
        The gradient, like ``phi``.

    Raises:
        KernelError: the site is static or a single pass; a shape, dtype or device does not fit.
    """
    op, site = "mhc::phi_backward", SiteSpec.decode(spec)
    _check_phi_backward(op, dz, X, f, h_post, h_res, phi, site)
    if kernels := launcher(op, site, X, dz, h_post, h_res, phi, branch=f):
        return kernels.phi_backward(dz, X, f, h_post, h_res, phi, site)
    if f is not None and h_post is not None and h_res is not None:
        X = post(X, f, h_post, h_res, spec)
    logits = phi.shape[-1] * (site.streams if constraint_of(site).per_stream else 1)
    grad_z = dz.reshape(-1, dz.shape[-1])[:, :logits].to(coefficient_dtype(X))
    return gradient_of_phi(grad_z, X, phi, site)


def _check_phi_backward(
    op: str,
    dz: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor | None,
    h_post: torch.Tensor | None,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    site: SiteSpec,
) -> None:
    _check_dynamic(op, site)
    check_state(op, X, site.streams, site.dim)
    check_tensor(op, "dz", dz, _dz_shape(X, site), X)
    check_tensor(op, "phi", phi, phi_shape(X, site), X)
    if f is not None and h_post is not None and h_res is not None:
        check_post(op, X, f, h_post, h_res, site)
    elif any(tensor is not None for tensor in (f, h_post, h_res)):
        raise KernelError(f"{op}: f, h_post and h_res are those of one seam: give all or none")


@phi_backward.register_fake
def _(
    dz: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor | None,
    h_post: torch.Tensor | None,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    spec: str,
) -> torch.Tensor:
    site = SiteSpec.decode(spec)
    _check_phi_backward("mhc::phi_backward", dz, X, f, h_post, h_res, phi, site)
    return empty_phi(phi, phi.dtype)


@torch.library.custom_op("mhc::post_backward_branch", mutates_args=())
def post_backward_branch(
    dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, spec: str
) -> torch.Tensor:
    """The gradient of the branch output, of those that ``mhc::post_backward`` gives.

    Args:
        dY: gradient of the next state.
        h_post: as given to ``mhc::post``.
        dtype: of the branch output.
        spec: `SiteSpec.encode`.

    Returns:
        The gradient, of the un-widened shape.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    op, site = "mhc::post_backward_branch", SiteSpec.decode(spec)
    _check_branch(op, dY, h_post, site)
    # An empty tensor stands for the branch output: its dtype decides.
    if kernels := launcher(op, site, dY, h_post, branch=dY.new_empty(0, dtype=dtype)):
        return kernels.post_backward_branch(dY, h_post, dtype, site)
    return gradient_of_branch(dY, h_post, dtype, site)


def _check_branch(op: str, dY: torch.Tensor, h_post: torch.Tensor, site: SiteSpec) -> None:
    check_state(op, dY, site.streams, site.dim)
    tokens = token_shape(dY.shape, site.dim) if site.dynamic else []
    check_tensor(op, "h_post", h_post, [*tokens, site.gates], dY)


@post_backward_branch.register_fake
def _(dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, spec: str) -> torch.Tensor:
    site = SiteSpec.decode(spec)
    _check_branch("mhc::post_backward_branch", dY, h_post, site)
    return dY.new_empty(narrow_shape(dY.shape, site.dim), dtype=dtype)


@torch.library.custom_op("mhc::post_backward_state", mutates_args=())
def post_backward_state(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::post_backward`` without the gradient of the branch output.

    Args:
        dY: as for `mhc_compile.kernels.ops_post.post_backward`, like the others.
        X: see there.
        f: see there.
        h_post: see there.
        h_res: see there.
        spec: see there.

    Returns:
        Gradients of ``X``, ``h_post`` and ``h_res``.

    Raises:
        KernelError: a shape, dtype or device does not fit.
    """
    op, site = "mhc::post_backward_state", SiteSpec.decode(spec)
    check_post_backward(op, dY, X, f, h_post, h_res, site)
    if kernels := launcher(op, site, X, dY, h_post, h_res, branch=f):
        return kernels.post_backward_state(dY, X, f, h_post, h_res, site)
    return gradients_but_branch(dY, X, f, h_post, h_res, site)


@post_backward_state.register_fake
def _(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op, site = "mhc::post_backward_state", SiteSpec.decode(spec)
    check_post_backward(op, dY, X, f, h_post, h_res, site)
    return X.new_empty(X.shape), h_post.new_empty(h_post.shape), h_res.new_empty(h_res.shape)
