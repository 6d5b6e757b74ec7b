"""Projection and gates: from a state to the logits of its mappings, and back.

The plain torch arithmetic shared by `pre` and the learned collapse. States are ``[T, n, C]``,
everything is in the coefficient dtype, and "static" rows have T = 1. Equation numbers are those of
arXiv 2512.24880.
"""

import torch

from mhc_compile.kernels.constraints.base import Gate


def project(x: torch.Tensor, phi: torch.Tensor, norm_eps: float, per_stream: bool) -> torch.Tensor:
    """Equations (14) and (15): one scan of the state.

    Args:
        x: ``[T, n, C]``.
        phi: ``[n * C, m]``, or ``[C, m / n]`` for all streams alike if ``per_stream``.
        norm_eps: inside the root of the norm.
        per_stream: norm and project each stream on its own.

    Returns:
        ``[T, m + w]``: the products z, then the inverse norms 1/r (w = 1, or n if ``per_stream``).
        Per stream, z is ordered column of phi first, stream second.
    """
    if per_stream:
        z = (x @ phi).mT.flatten(1)
        mean_square = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
    else:
        flat = x.flatten(1)
        z = flat @ phi
        mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
    return torch.cat((z, (mean_square + norm_eps).rsqrt()), -1)


def normalised(saved: torch.Tensor, width: int) -> torch.Tensor:
    """``z / r``, ``[T, width]``, from what `project` returned: divided after the product."""
    z, inverse = saved[:, :width], saved[:, width:]
    return z * _spread(inverse, width)


def project_backward(
    grad: torch.Tensor, saved: torch.Tensor, x: torch.Tensor, phi: torch.Tensor, per_stream: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of ``normalised(project(x, phi))``.

    Args:
        grad: ``[T, m]``, the gradient of ``z / r``.
        saved: what `project` returned.
        x: ``[T, n, C]``.
        phi: as given to `project`.
        per_stream: as given to `project`.

    Returns:
        The gradient of ``x``, and that of z, from which `phi_gradient` goes on.
    """
    width = grad.shape[-1]
    z, inverse = saved[:, :width], saved[:, width:]
    grad_z = grad * _spread(inverse, width)
    # 1/r = (mean(x^2) + eps)^(-1/2), so d(1/r)/dx = -(1/r)^3 x / N over the N values of one norm.
    norms = inverse.shape[-1]
    grad_inverse = (grad * z).reshape(len(z), width // norms, norms).sum(1)
    values = x.shape[-1] if per_stream else x.shape[-1] * x.shape[-2]
    shrink = -grad_inverse * inverse.pow(3) / values
    rows, flat = _projected(grad_z, x, per_stream)
    grad_x = torch.addmm(flat * shrink.reshape(-1, 1), rows, phi.mT)
    return grad_x.view(x.shape), grad_z


def phi_gradient(grad_z: torch.Tensor, x: torch.Tensor, per_stream: bool) -> torch.Tensor:
    """Gradient of phi.

    Args:
        grad_z: ``[T, m]``, second result of `project_backward`.
        x: as given to it, like ``per_stream``.
        per_stream: see there.
    """
    rows, flat = _projected(grad_z, x, per_stream)
    return flat.mT @ rows


def _projected(
    z: torch.Tensor, x: torch.Tensor, per_stream: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``z`` and of ``x`` that belong to one product: a token, or a stream of it."""
    if not per_stream:
        return z, x.flatten(1)
    n = x.shape[1]
    return z.reshape(len(z), z.shape[1] // n, n).mT.flatten(0, 1), x.flatten(0, 1)


def affine(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    groups: list[int],
    gate: Gate,
) -> torch.Tensor:
    """Equation (16): ``alpha * hidden + bias`` with one scale per group of columns.

    Args:
        hidden: ``[T, m]``, the normalised products.
        bias: ``[m]``.
        alpha: one scale per group.
        groups: widths of the groups, summing to m.
        gate: "tanh" bounds ``hidden`` before it is scaled.

    Returns:
        ``[T, m]``.
    """
    return _bounded(hidden, gate) * _scales(alpha, groups) + bias


def affine_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    alpha: torch.Tensor,
    groups: list[int],
    gate: Gate,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``hidden``, ``bias`` and ``alpha`` of a dynamic `affine`."""
    bounded = _bounded(hidden, gate)
    scales = _scales(alpha, groups)
    grad_alpha = torch.stack([part.sum() for part in torch.split(grad * bounded, groups, -1)])
    grad_hidden = grad * scales
    if gate == "tanh":
        grad_hidden = grad_hidden * (1.0 - bounded.square())
    return grad_hidden, grad.sum(0), grad_alpha


def gate_weights(h: torch.Tensor, factor: float, gate: Gate) -> torch.Tensor:
    """Equations (17) and (18): ``factor * sigmoid(h)``; "tanh" has bounded before: ``h`` itself."""
    return h if gate == "tanh" else factor * h.sigmoid()


def gate_weights_backward(
    grad: torch.Tensor, h: torch.Tensor, factor: float, gate: Gate
) -> torch.Tensor:
    """Gradient of `gate_weights` with respect to ``h``."""
    if gate == "tanh":
        return grad
    sigmoid = h.sigmoid()
    return grad * (factor * sigmoid * (1.0 - sigmoid))


def _spread(inverse: torch.Tensor, width: int) -> torch.Tensor:
    """``[T, w]`` as ``[T, width]``: the norms repeat along the columns, stream by stream."""
    return inverse.repeat(1, width // inverse.shape[-1])


def _bounded(hidden: torch.Tensor, gate: Gate) -> torch.Tensor:
    return hidden.tanh() if gate == "tanh" else hidden


def _scales(alpha: torch.Tensor, groups: list[int]) -> torch.Tensor:
    return torch.cat([alpha[i].expand(width) for i, width in enumerate(groups)])
