"""Parts of the backward called by themselves; see `launch`."""

import torch

from mhc_compile.kernels.cpp.call import (
    call,
    channels_last,
    coefficients,
    library,
    size_of,
    streams_last,
)
from mhc_compile.kernels.layout import dz_width, empty_phi, is_by_output
from mhc_compile.kernels.spec import SiteSpec


class ParameterGradients:
    """Room for what a backward gives for phi, bias and alpha, in float32.

    Args:
        parameters: phi, bias and alpha.
        saved: what `pre` saved.
        spec: the site.
        with_dz: whether the gradient of phi is left for later, and that of z in its place.
    """

    def __init__(
        self,
        parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        saved: torch.Tensor,
        spec: SiteSpec,
        with_dz: bool,
    ) -> None:
        phi, *vectors = parameters
        if with_dz:
            size = (*saved.shape[:-1], dz_width(saved.shape[-1], spec.streams))
            first = phi.new_zeros(size, dtype=torch.float32)
        else:
            first = empty_phi(phi, torch.float32)
        bias, alpha = (p.new_empty(p.shape, dtype=torch.float32) for p in vectors)
        self._made = (first, bias, alpha)
        self._dtypes = [p.dtype for p in parameters]
        self._with_dz = with_dz

    @property
    def pointers(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the generated functions: dphi, dbias, dalpha and dz."""
        first, *rest = self._made
        return (None, *rest, first) if self._with_dz else (first, *rest, None)

    @property
    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order of the ops, and in the dtypes of the parameters; dz is float32."""
        first, dbias, dalpha = self._made
        of_phi, of_bias, of_alpha = self._dtypes
        return (
            first if self._with_dz else first.to(of_phi),
            dbias.to(of_bias),
            dalpha.to(of_alpha),
        )


def phi_backward(
    dz: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor | None,
    h_post: torch.Tensor | None,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    spec: SiteSpec,
) -> torch.Tensor:
    """``mhc::phi_backward``."""
    rows = streams_last(X, spec)
    tokens, channels = size_of(rows)
    branch = None if f is None else channels_last(f, spec, X.dtype)
    mappings: list[torch.Tensor] | tuple[None, None] = (None, None)
    if h_post is not None and h_res is not None:
        mappings = coefficients(h_post, h_res)
    dphi = empty_phi(phi, torch.float32)
    arguments = (*coefficients(dz), rows, branch, *mappings, dphi)
    flag = is_by_output(phi)
    call(library(spec, X.dtype), "phi_backward", arguments, tokens, channels, flag)
    return dphi.to(phi.dtype)
