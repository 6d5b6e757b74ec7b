"""The generated seam with the norm of its branch input called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.layout import SeamNormGradients
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_backward import product_count
from mhc_compile.kernels.triton.emit_norm import through
from mhc_compile.kernels.triton.maps import site_maps
from mhc_compile.kernels.triton.site import Site, floats


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
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::seam_norm``; ``shapes`` are those of the next h_post, h_res, saved and statistics."""
    site, maps = Site(spec, X), site_maps(spec)
    out, y = X.new_empty(X.shape), X.new_empty((*X.shape[:-2], site.channels))
    results = site.mappings(shapes[:3])
    statistics = site.room(*shapes[3])
    mappings, parameters = floats(h_post, h_res), floats(phi, bias, alpha)
    norm = (_vector(site, weight, 1.0), _vector(site, shift, 0.0), statistics)
    if site.one_launch(maps):
        site.run("seam_norm", X, f, out, y, *mappings, *parameters, *results, *norm)
    else:
        partial = site.partial(maps)
        site.run("seam_scan", X, f, out, *mappings, parameters[0], partial)
        site.run("seam_norm_mix", out, y, partial, *parameters[1:], *results, *norm)
    return out, y, *results, statistics


def _vector(site: Site, vector: torch.Tensor | None, default: float) -> torch.Tensor:
    return site.room(site.channels).fill_(default) if vector is None else vector.float()


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
    spec: SiteSpec,
) -> SeamNormGradients:
    """``mhc::seam_norm_backward``."""
    site, maps = Site(spec, X), site_maps(spec)
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    mappings = floats(h_post, h_res)
    wide_phi, wide_bias, wide_alpha = floats(phi, bias, alpha)
    work, sums = site.work(maps)
    given = (wide_bias, wide_alpha, *floats(saved, dh_post_next, dh_res_next), work, sums)
    of_u = site.room(site.tokens, through(spec))
    norm = (_vector(site, weight, 1.0), *floats(statistics), of_u)
    site.run("seam_norm_backward_maps", X, f, dy, *mappings, *given, *norm)
    kernel = "seam_norm_backward_streams"
    slices = site.blocks(site.channels, kernel, "BC")
    products = site.room(slices, product_count(spec), site.tokens)
    parts = -(-site.tokens // site.span(kernel))
    dweight, dshift = (site.room(parts, site.channels) for _ in range(2))
    streams = (dX_next, dy, X, f, dX, df)
    sums_of_norm = (*norm, dweight, dshift)
    site.run(kernel, *streams, *mappings, wide_phi, work, products, *sums_of_norm)
    dh_post = torch.empty_like(h_post, memory_format=torch.contiguous_format)
    dh_res = h_res.new_empty(h_res.shape) if maps.mixes else h_res.new_zeros(h_res.shape)
    site.run("sum_products", products, dh_post, dh_res, slices=slices)
    dphi = site.phi_gradient("seam_backward_phi", phi, X, f, *mappings, work)
    return (
        *(dX, df, dh_post, dh_res, dphi),
        *site.sum_maps(maps, sums, bias, alpha),
        site.room(0) if weight is None else site.sum_rows(dweight, weight),
        site.room(0) if shift is None else site.sum_rows(dshift, shift),
    )
