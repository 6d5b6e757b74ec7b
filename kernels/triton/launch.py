"""The generated kernels called with tensors: a `mhc_compile.kernels.select.Launcher`.

Results have the shapes and dtypes of the ops' own bodies. Callers have asked `obstacle` before:
the state is ``[..., n, C]`` in a dtype of `STREAM_TYPES`, on a device that Triton serves, or on the
CPU in a process that interprets. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import PreGradients, SeamGradients
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch_matrix, launch_norm, launch_replay, launch_static
from mhc_compile.kernels.triton.emit_backward import product_count
from mhc_compile.kernels.triton.maps import head_maps, site_maps
from mhc_compile.kernels.triton.site import Site, floats

replay = launch_replay.replay
seam_norm = launch_norm.seam_norm
seam_norm_backward = launch_norm.seam_norm_backward


def pre(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
    gates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre``; ``shapes`` are those of h_post, h_res and saved."""
    site, maps = Site(spec, X), site_maps(spec)
    if phi is None or alpha is None:
        return launch_static.pre(site, X, bias, shapes, gates)
    u = X.new_empty((*X.shape[:-2], site.channels))
    h_post, h_res, saved = site.mappings(shapes)
    parameters = floats(phi, bias, alpha)
    given = () if gates is None else floats(gates)
    if site.one_launch(maps):
        site.run("pre", X, u, *given, *parameters, h_post, h_res, saved)
    elif given:
        partial = site.partial(maps)
        site.run("pre_scan", X, u, *given, parameters[0], partial)
        site.run("pre_mix", partial, *parameters[1:], h_post, h_res, saved)
    else:
        partial = site.partial(maps)
        site.run("pre_scan", X, parameters[0], partial)
        site.run("pre_mix", X, u, partial, *parameters[1:], h_post, h_res, saved)
    return u, h_post, h_res, saved


def pre_backward(
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    saved: torch.Tensor,
    spec: SiteSpec,
    dX_more: torch.Tensor | None = None,
    with_dz: bool = False,
    gates: torch.Tensor | None = None,
) -> PreGradients:
    """``mhc::pre_backward``, or ``mhc::pre_backward_dz``; the latter has no gates."""
    site, maps = Site(spec, X), site_maps(spec)
    if phi is None or alpha is None:
        dX, dbias, dgates = launch_static.pre_backward(site, du, dh_post, dh_res, X, bias, gates)
        dX = dX if dX_more is None else dX.add_(dX_more)
        return dX, site.room(0), dbias, site.room(0), dgates
    dX = X.new_empty(X.shape)
    wide_phi, wide_bias, wide_alpha = floats(phi, bias, alpha)
    work, sums = site.work(maps)
    mapped = (wide_bias, wide_alpha, *floats(saved, dh_post, dh_res), work, sums)
    site.run("pre_backward_maps", *(() if maps.given else (X, du)), *mapped)
    more = () if dX_more is None else (dX_more.to(X.dtype),)
    kernel = "pre_more_backward_streams" if more else "pre_backward_streams"
    dgates = site.room(0)
    if gates is None:
        site.run(kernel, du, X, *more, dX, wide_phi, work)
    else:
        slices = site.blocks(site.channels, kernel, "BC")
        products = site.room(slices, product_count(spec, seam=False), site.tokens)
        site.run(kernel, du, X, *more, dX, *floats(gates), wide_phi, work, products)
        dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
        site.run("sum_weights", products, dgates, slices=slices)
    by_phi = _dz(work, saved) if with_dz else phi_backward(work, X, None, None, None, phi, spec)
    dbias, dalpha = site.sum_maps(maps, sums, bias, alpha)
    return dX, by_phi, dbias, dalpha, dgates


def _dz(work: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    return work.view(*saved.shape[:-1], work.shape[-1])


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
    site = Site(spec, X)
    if f is None or h_post is None or h_res is None:
        return site.phi_gradient("pre_backward_phi", phi, X, *floats(dz))
    return site.phi_gradient("seam_backward_phi", phi, X, f, *floats(h_post, h_res, dz))


def seam(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::seam``; ``shapes`` are those of the next h_post, h_res and saved."""
    site, maps = Site(spec, X), site_maps(spec)
    if phi is None or alpha is None:
        return launch_static.seam(site, X, f, h_post, h_res, bias, shapes)
    out, u = X.new_empty(X.shape), X.new_empty((*X.shape[:-2], site.channels))
    results = site.mappings(shapes)
    mappings, parameters = floats(h_post, h_res), floats(phi, bias, alpha)
    if site.one_launch(maps):
        site.run("seam", X, f, out, u, *mappings, *parameters, *results)
    elif maps.given:
        partial = site.partial(maps)
        site.run("seam_scan", X, f, out, u, *mappings, parameters[0], partial)
        site.run("pre_mix", partial, *parameters[1:], *results)
    else:
        partial = site.partial(maps)
        site.run("seam_scan", X, f, out, *mappings, parameters[0], partial)
        site.run("pre_mix", out, u, partial, *parameters[1:], *results)
    return out, u, *results


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
    spec: SiteSpec,
    with_dz: bool = False,
) -> SeamGradients:
    """``mhc::seam_backward``, or ``mhc::seam_backward_dz``."""
    site, maps = Site(spec, X), site_maps(spec)
    grads = (dX_next, du, dh_post_next, dh_res_next)
    if phi is None or alpha is None:
        return launch_static.seam_backward(site, grads, X, f, h_post, h_res, bias)
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    mappings = floats(h_post, h_res)
    wide_phi, wide_bias, wide_alpha = floats(phi, bias, alpha)
    work, sums = site.work(maps)
    given = (wide_bias, wide_alpha, *floats(saved, dh_post_next, dh_res_next))
    if maps.given:
        site.run("pre_backward_maps", *given, work, sums)
    else:
        site.run("seam_backward_maps", X, f, du, *mappings, *given, work, sums)
    slices = site.blocks(site.channels, "seam_backward_streams", "BC")
    products = site.room(slices, product_count(spec), site.tokens)
    streams = (dX_next, du, X, f, dX, df)
    site.run("seam_backward_streams", *streams, *mappings, wide_phi, work, products)
    dh_post = torch.empty_like(h_post, memory_format=torch.contiguous_format)
    dh_res = h_res.new_empty(h_res.shape) if maps.mixes else h_res.new_zeros(h_res.shape)
    site.run("sum_products", products, dh_post, dh_res, slices=slices)
    by_phi = _dz(work, saved) if with_dz else phi_backward(work, X, f, h_post, h_res, phi, spec)
    return dX, df, dh_post, dh_res, by_phi, *site.sum_maps(maps, sums, bias, alpha)


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    site = Site(spec, X)
    out = X.new_empty(X.shape)
    site.run("post", X, f, out, *floats(h_post, h_res))
    return out


def mix(X: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::mix``."""
    out = X.new_empty(X.shape)
    Site(spec, X).run("mix", X, out, *floats(h_res))
    return out


def post_backward(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::post_backward``."""
    df = f.new_empty(f.shape)
    dX, dh_post, dh_res = _post_backward("post_backward", dY, X, f, h_post, h_res, spec, df)
    return dX, df, dh_post, dh_res


def post_backward_branch(
    dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post_backward_branch``."""
    site = Site(spec, dY)
    df = dY.new_empty((*dY.shape[:-2], site.channels), dtype=dtype)
    site.run("post_backward_branch", dY, df, *floats(h_post))
    return df


def post_backward_state(
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::post_backward_state``."""
    return _post_backward("post_backward_state", dY, X, f, h_post, h_res, spec)


def _post_backward(
    kernel: str,
    dY: torch.Tensor,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    spec: SiteSpec,
    *df: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of X, h_post and h_res; the kernel may write that of f as well."""
    site, dX = Site(spec, X), X.new_empty(X.shape)
    given = (dY, X, f, dX, *df, *floats(h_post, h_res))
    if not spec.dynamic:
        by_token = launch_static.products(site)
        site.run(kernel, *given, *by_token)
        return dX, *launch_static.sum_products(site, by_token, h_post, h_res)
    mixes = constraint_of(spec).mixes
    dh_post = h_post.new_empty(h_post.shape)
    dh_res = h_res.new_empty(h_res.shape) if mixes else h_res.new_zeros(h_res.shape)
    site.run(kernel, *given, dh_post, dh_res)
    return dX, dh_post, dh_res


def read(X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::read``."""
    site = Site(spec, X)
    if not spec.dynamic:
        return launch_static.read(site, X, gates)
    u = X.new_empty((*X.shape[:-2], site.channels))
    site.run("read_streams", X, u, *floats(gates))
    return u


def read_backward(
    du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mhc::read_backward``."""
    site = Site(spec, X)
    if not spec.dynamic:
        return launch_static.read_backward(site, du, X, gates)
    dX = X.new_empty(X.shape)
    dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    site.run("read_streams_backward", du, X, dX, *floats(gates), dgates)
    return dX, dgates


def collapse(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    spec: SiteSpec,
) -> torch.Tensor:
    """``mhc::collapse``."""
    site = Site(spec, X)
    if bias is None:
        out = X.new_empty((*X.shape[:-2], site.channels))
        site.run(f"collapse_{mode}", X, out)
        return out
    if phi is None or alpha is None:
        return launch_static.read(site, X, launch_static.head_weights(site, bias))
    return _head(site, X, phi, bias, alpha)[0]


def _head(
    site: Site, X: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The collapsed streams, and z and 1/r."""
    maps = head_maps(site.spec)
    out = X.new_empty((*X.shape[:-2], site.channels))
    saved = site.room(site.tokens, maps.saved)
    parameters = floats(phi, bias, alpha)
    if site.one_launch(maps):
        site.run("head", X, out, *parameters, saved)
    else:
        partial = site.partial(maps)
        site.run("head_scan", X, parameters[0], partial)
        site.run("head_mix", X, out, partial, *parameters[1:], saved)
    return out, saved


def collapse_backward(
    dx: torch.Tensor,
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::collapse_backward``; the products of a dynamic head are made again."""
    site, maps = Site(spec, X), head_maps(spec)
    if phi is None or alpha is None:
        return launch_static.head_backward(site, dx, X, bias)
    _, saved = _head(site, X, phi, bias, alpha)
    dX = X.new_empty(X.shape)
    wide_phi, wide_bias, wide_alpha = floats(phi, bias, alpha)
    work, sums = site.work(maps)
    site.run("head_backward_maps", X, dx, wide_bias, wide_alpha, saved, work, sums)
    site.run("head_backward_streams", dx, X, dX, wide_phi, work)
    dphi = site.phi_gradient("head_backward_phi", phi, X, work)
    return dX, dphi, *site.sum_maps(maps, sums, bias, alpha)


def sinkhorn(logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn``."""
    return launch_matrix.make_matrix(logits, spec)


def sinkhorn_backward(grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn_backward``."""
    return launch_matrix.make_matrix_backward(grad, logits, spec)
