"""The norm that a branch starts with, in plain torch: forward, backward, and what it saves.

``y = (u - mean) r weight + shift`` with ``r = (mean((u - mean)^2) + eps)^(-1/2)``; the RMS norm has
no mean. Here u and y are ``[T, C]`` in the coefficient dtype, u with the values that it has in the
dtype of the streams.
"""

import torch

from mhc_compile.kernels.spec import SiteSpec

STATISTICS = {"rms": 1, "layer": 2}
"""Numbers per token that are saved: r, and the mean where there is one."""


def normalise(
    u: torch.Tensor,
    weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    site: SiteSpec,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised branch input, and its statistics ``[T, 1 or 2]``.

    Args:
        u: the branch input.
        weight: ``[C]``; None is 1.
        shift: ``[C]``; None is 0.
        site: the specification, which tells the kind of norm.
        dtype: of the streams, to which `SiteSpec.branch_rounds` rounds.
    """
    mean = u.mean(-1, keepdim=True) if site.branch_norm == "layer" else None
    centred = u if mean is None else u - mean
    r = (centred.square().mean(-1, keepdim=True) + site.branch_eps).rsqrt()
    y = _rounded(centred * r, site, dtype)
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if shift is None else y + shift.to(y.dtype)
    return y, r if mean is None else torch.cat((r, mean), -1)


def normalise_backward(
    dy: torch.Tensor,
    u: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    site: SiteSpec,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, of the weight and of the shift, from that of the result.

    A rounding passes gradients on as they are.

    Args:
        dy: the gradient.
        u: as given to `normalise`, like ``weight``, ``site`` and ``dtype``.
        statistics: second result of `normalise`.
        weight: see there.
        site: see there.
        dtype: see there.
    """
    r = statistics[:, :1]
    centred = u - statistics[:, 1:] if site.branch_norm == "layer" else u
    y = centred * r
    g = dy if weight is None else dy * weight.to(dy.dtype)
    du = g - y * (g * y).mean(-1, keepdim=True)
    if site.branch_norm == "layer":
        du = du - g.mean(-1, keepdim=True)
    return du * r, (dy * _rounded(y, site, dtype)).sum(0), dy.sum(0)


def _rounded(y: torch.Tensor, site: SiteSpec, dtype: torch.dtype) -> torch.Tensor:
    return y.to(dtype).to(y.dtype) if site.branch_rounds else y
