"""``mhc::sinkhorn``: the projection alone, where a graph holds only that."""

from typing import Any

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.constraints.sinkhorn import Sinkhorn
from mhc_compile.kernels.layout import check_tensor, coefficient_dtype
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


def _check(op: str, logits: torch.Tensor, spec: str) -> tuple[SiteSpec, Sinkhorn]:
    site = SiteSpec.decode(spec)
    constraint, n = constraint_of(site), site.streams
    if not isinstance(constraint, Sinkhorn):
        raise KernelError(
            f"{op}: constraint {site.constraint!r} is no Sinkhorn iteration; use 'sinkhorn' or "
            "'sinkhorn_softmax'"
        )
    if not logits.dtype.is_floating_point or list(logits.shape[-2:]) != [n, n]:
        raise KernelError(
            f"{op}: logits are {logits.dtype} of shape {tuple(logits.shape)}; the specification "
            f"needs floating point matrices of {n} x {n} in the last two axes"
        )
    return site, constraint


@torch.library.custom_op("mhc::sinkhorn", mutates_args=())
def sinkhorn(logits: torch.Tensor, spec: str) -> torch.Tensor:
    """Make matrices (approximately) doubly stochastic.

    Args:
        logits: ``[..., n, n]`` in [out, in] order, any floating dtype.
        spec: `SiteSpec.encode` with one of the two Sinkhorn constraints.

    Returns:
        ``[..., n, n]`` in the dtype of ``logits``, computed in float32 at least.

    Raises:
        KernelError: shape, dtype or constraint do not fit.
    """
    site, constraint = _check("mhc::sinkhorn", logits, spec)
    if kernels := launcher("mhc::sinkhorn", site, logits):
        return kernels.sinkhorn(logits, site)
    flat = logits.to(coefficient_dtype(logits)).flatten(-2)
    return constraint.matrix(flat, site).to(logits.dtype)


@sinkhorn.register_fake
def _(logits: torch.Tensor, spec: str) -> torch.Tensor:
    _check("mhc::sinkhorn", logits, spec)
    return logits.new_empty(logits.shape)


@torch.library.custom_op("mhc::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(grad: torch.Tensor, logits: torch.Tensor, spec: str) -> torch.Tensor:
    """Gradient of `sinkhorn`: of the same iterations, recomputed from the logits.

    Args:
        grad: gradient of the matrices.
        logits: as given to `sinkhorn`.
        spec: as given to `sinkhorn`.

    Returns:
        Gradient of ``logits``.

    Raises:
        KernelError: shape, dtype or constraint do not fit.
    """
    site, constraint = _check("mhc::sinkhorn_backward", logits, spec)
    check_tensor("mhc::sinkhorn_backward", "grad", grad, logits.shape, logits)
    if kernels := launcher("mhc::sinkhorn_backward", site, logits, grad):
        return kernels.sinkhorn_backward(grad, logits, site)
    dtype = coefficient_dtype(logits)
    flat = constraint.matrix_backward(grad.to(dtype), logits.to(dtype).flatten(-2), site)
    return flat.reshape(logits.shape).to(logits.dtype)


@sinkhorn_backward.register_fake
def _(grad: torch.Tensor, logits: torch.Tensor, spec: str) -> torch.Tensor:
    _check("mhc::sinkhorn_backward", logits, spec)
    check_tensor("mhc::sinkhorn_backward", "grad", grad, logits.shape, logits)
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits, ctx.spec = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    return sinkhorn_backward(grad, logits, ctx.spec), None


sinkhorn.register_autograd(_backward, setup_context=_setup_context)
