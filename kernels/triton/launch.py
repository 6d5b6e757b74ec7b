"""The generated kernels called with tensors.

Results have the shapes and dtypes of the ops' own bodies. Callers have asked `obstacle` before:
the state is ``[..., n, C]`` in a dtype of `STREAM_TYPES`, on a device that Triton serves, or on the
CPU in a process that interprets. Nothing here waits for the device.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import SeamGradients
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import kernels, source
from mhc_compile.kernels.triton.emit_backward import product_count
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.maps import Maps, head_maps, maps_of, site_maps
from mhc_compile.kernels.triton.tiles import TARGETS, Target, Tile, one_launch, span, tile


def pre(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre``; ``shapes`` are those of h_post, h_res and saved."""
    site, maps = _Site(spec, X), site_maps(spec)
    assert phi is not None
    assert alpha is not None
    u = X.new_empty((*X.shape[:-2], site.channels))
    h_post, h_res, saved = site.mappings(shapes)
    parameters = _floats(phi, bias, alpha)
    if site.one_launch(maps):
        site.run("pre", X, u, *parameters, h_post, h_res, saved)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre_backward``."""
    site, maps = _Site(spec, X), site_maps(spec)
    assert phi is not None
    assert alpha is not None
    dX = X.new_empty(X.shape)
    wide_phi, wide_bias, wide_alpha = _floats(phi, bias, alpha)
    work, sums = site.work(maps)
    grads = _floats(dh_post, dh_res)
    site.run("pre_backward_maps", X, du, wide_bias, wide_alpha, *_floats(saved), *grads, work, sums)
    site.run("pre_backward_streams", du, X, dX, wide_phi, work)
    dphi = site.phi_gradient("pre_backward_phi", phi, X, work)
    return dX, dphi, *site.sum_maps(maps, sums, bias, alpha)


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
    site, maps = _Site(spec, X), site_maps(spec)
    assert phi is not None
    assert alpha is not None
    out, u = X.new_empty(X.shape), X.new_empty((*X.shape[:-2], site.channels))
    results = site.mappings(shapes)
    mappings, parameters = _floats(h_post, h_res), _floats(phi, bias, alpha)
    if site.one_launch(maps):
        site.run("seam", X, f, out, u, *mappings, *parameters, *results)
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
) -> SeamGradients:
    """``mhc::seam_backward``."""
    site, maps = _Site(spec, X), site_maps(spec)
    assert phi is not None
    assert alpha is not None
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    mappings = _floats(h_post, h_res)
    wide_phi, wide_bias, wide_alpha = _floats(phi, bias, alpha)
    work, sums = site.work(maps)
    grads = _floats(saved, dh_post_next, dh_res_next)
    site.run(
        "seam_backward_maps", X, f, du, *mappings, wide_bias, wide_alpha, *grads, work, sums
    )
    slices = site.blocks(site.channels, "seam_backward_streams", "BC")
    products = site.floats(slices, product_count(spec), site.tokens)
    streams = (dX_next, du, X, f, dX, df)
    site.run("seam_backward_streams", *streams, *mappings, wide_phi, work, products)
    dh_post = torch.empty_like(h_post, memory_format=torch.contiguous_format)
    dh_res = h_res.new_empty(h_res.shape) if maps.mixes else h_res.new_zeros(h_res.shape)
    site.run("sum_products", products, dh_post, dh_res, slices=slices)
    dphi = site.phi_gradient("seam_backward_phi", phi, X, f, *mappings, work)
    return dX, df, dh_post, dh_res, dphi, *site.sum_maps(maps, sums, bias, alpha)


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    site = _Site(spec, X)
    out = X.new_empty(X.shape)
    site.run("post", X, f, out, *_floats(h_post, h_res))
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
    site, mixes = _Site(spec, X), constraint_of(spec).mixes
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    dh_post = h_post.new_empty(h_post.shape)
    dh_res = h_res.new_empty(h_res.shape) if mixes else h_res.new_zeros(h_res.shape)
    site.run("post_backward", dY, X, f, dX, df, *_floats(h_post, h_res), dh_post, dh_res)
    return dX, df, dh_post, dh_res


def collapse(X: torch.Tensor, mode: str, spec: SiteSpec) -> torch.Tensor:
    """``mhc::collapse`` with ``mode`` "mean" or "sum"."""
    site = _Site(spec, X)
    out = X.new_empty((*X.shape[:-2], site.channels))
    site.run(f"collapse_{mode}", X, out)
    return out


def collapse_learned(
    X: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::collapse`` with a learned, dynamic head."""
    return _head(_Site(spec, X), X, phi, bias, alpha)[0]


def _head(
    site: "_Site", X: torch.Tensor, phi: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The collapsed streams, and z and 1/r."""
    maps = head_maps(site.spec)
    out = X.new_empty((*X.shape[:-2], site.channels))
    saved = site.floats(site.tokens, maps.saved)
    parameters = _floats(phi, bias, alpha)
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
    phi: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::collapse_backward`` of a dynamic head, whose products are made again."""
    site, maps = _Site(spec, X), head_maps(spec)
    _, saved = _head(site, X, phi, bias, alpha)
    dX = X.new_empty(X.shape)
    wide_phi, wide_bias, wide_alpha = _floats(phi, bias, alpha)
    work, sums = site.work(maps)
    site.run("head_backward_maps", X, dx, wide_bias, wide_alpha, saved, work, sums)
    site.run("head_backward_streams", dx, X, dX, wide_phi, work)
    dphi = site.phi_gradient("head_backward_phi", phi, X, work)
    return dX, dphi, *site.sum_maps(maps, sums, bias, alpha)


def expand(x: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::expand``."""
    site = _Site(spec, x, x.shape[:-1].numel())
    out = x.new_empty((*x.shape[:-1], spec.streams, site.channels))
    site.run("expand", x, out)
    return out


class _Site:
    """A site's kernels and sizes, for one state."""

    def __init__(self, spec: SiteSpec, X: torch.Tensor, tokens: int | None = None) -> None:
        self.spec = spec
        self.dtype = X.dtype
        self.device = X.device
        self.channels = X.shape[-1]
        self.tokens = X.shape[:-2].numel() if tokens is None else tokens
        self.target = target_of(X.device)
        self.module = load(source(spec, X.dtype))

    def tile(self, kernel: str) -> Tile:
        maps = maps_of(kernel, self.spec)
        return tile(kernel, maps, self.channels, self.dtype, self.target)

    def blocks(self, size: int, kernel: str, constant: str) -> int:
        """How many programs of a kernel share ``size``."""
        return -(-size // int(self.tile(kernel).constants[constant]))

    def one_launch(self, maps: Maps) -> bool:
        return one_launch(maps, self.channels, self.dtype, self.tokens, self.target)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def mappings(self, shapes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """Room for h_post, h_res and saved."""
        h_post, h_res, saved = (self.floats(*shape) for shape in shapes)
        if not constraint_of(self.spec).mixes:
            torch.eye(self.spec.streams, out=h_res)
        return h_post, h_res, saved

    def partial(self, maps: Maps) -> torch.Tensor:
        """Room for the sums of every slice of the channels."""
        slices = self.blocks(self.channels, f"{maps.prefix}_scan", "SLICE")
        return self.floats(slices, self.tokens, maps.partial)

    def work(self, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for numbers per token, and for sums per program, of the gradients of the logits."""
        programs = self.blocks(self.tokens, f"{maps.prefix}_backward_maps", "BT")
        sums = self.floats(programs, maps.width + len(maps.groups))
        return self.floats(self.tokens, maps.work), sums

    def phi_gradient(self, kernel: str, phi: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The gradient of phi: the part of every chunk of tokens, and their sum."""
        parts = self.floats(-(-self.tokens // self.span(kernel)), *phi.shape)
        self.run(kernel, *tensors, parts)
        return self.sum_rows(parts, phi)

    def span(self, kernel: str) -> int:
        return span(self.tokens, self.channels, self.tile(kernel))

    def sum_rows(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``rows`` ``[r, ...]`` added over r, in the dtype and shape of ``like``."""
        count, columns = rows.shape[0], like.numel()
        most = int(self.tile("sum_rows").constants["SPAN"])
        while count > most:
            fewer = self.floats(-(-count // most), columns)
            self._sum_rows(rows, fewer, count, columns)
            rows, count = fewer, len(fewer)
        total = like.new_empty(like.shape)
        self._sum_rows(rows, total, count, columns)
        return total

    def _sum_rows(self, rows: torch.Tensor, total: torch.Tensor, count: int, columns: int) -> None:
        grid = (self.blocks(columns, "sum_rows", "BK"), self.blocks(count, "sum_rows", "SPAN"))
        self._start("sum_rows", grid, rows, total, count, columns)

    def sum_maps(
        self, maps: Maps, sums: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of bias and alpha from the sums of every program."""
        dbias, dalpha = bias.new_empty(bias.shape), alpha.new_empty(alpha.shape)
        self._start(f"{maps.prefix}_sum_maps", (1,), sums, dbias, dalpha, len(sums))
        return dbias, dalpha

    def run(self, kernel: str, *tensors: torch.Tensor, **integers: int) -> None:
        """Run a kernel over all tokens and channels; ``integers`` are those besides T."""
        extents = self._extents(kernel)
        given = {"T": self.tokens, "SPAN": extents[-1][1]}
        given |= {name.upper(): value for name, value in integers.items()}
        wanted = kernels(self.spec)[kernel].integers
        grid = tuple(-(-size // step) for size, step in extents)
        self._start(kernel, grid, *tensors, *(given[name] for name in wanted))

    def _extents(self, kernel: str) -> list[tuple[int, int]]:
        """What each axis of a kernel's grid divides, and by what."""
        constants = self.tile(kernel).constants
        if kernel.endswith(("_backward_streams", "_backward_phi")):
            return [(self.channels, int(constants["BC"])), (self.tokens, self.span(kernel))]
        tokens = (self.tokens, int(constants.get("BT", 1)))
        if kernel.endswith("_scan"):
            return [tokens, (self.channels, int(constants["SLICE"]))]
        if kernel in ("post", "expand", "collapse_mean", "collapse_sum"):
            return [tokens, (self.channels, int(constants["BC"]))]
        return [tokens]

    def _start(self, kernel: str, grid: tuple[int, ...], *arguments: torch.Tensor | int) -> None:
        chosen = self.tile(kernel)
        dense = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        with _on(self.device):
            getattr(self.module, kernel)[grid](
                *dense,
                **chosen.constants,
                num_warps=chosen.warps,
                num_stages=chosen.stages,
                enable_fp_fusion=True,  # Triton 3.10 turns it off by default
            )


def target_of(device: torch.device) -> Target:
    """The target whose tiles a device gets."""
    return TARGETS["sm_90"]


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def _floats(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.float() for tensor in tensors]
