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
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.tiles import TARGETS, Target, Tile, tile


def post(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """``mhc::post``."""
    site = _Site(spec, X)
    out = X.new_empty(X.shape)
    chosen = site.tile("post")
    grid = (site.tokens, _blocks(site.channels, chosen, "BC"))
    site.run("post", chosen, grid, X, f, out, *_floats(h_post, h_res))
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
    site = _Site(spec, X)
    n = spec.streams
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    # Gradients of static mappings are sums over the tokens, taken afterwards.
    dh_post = X.new_empty((site.tokens, n), dtype=torch.float32)
    mixes = constraint_of(spec).mixes
    dh_res = X.new_empty((site.tokens, n * n) if mixes else (0,), dtype=torch.float32)
    site.run(
        "post_backward",
        site.tile("post_backward"),
        (site.tokens,),
        *(dY, X, f, dX, df, *_floats(h_post, h_res), dh_post, dh_res),
    )
    if not mixes:
        dh_res = X.new_zeros(h_res.shape, dtype=torch.float32)
    return (
        dX,
        df,
        dh_post.reshape(h_post.shape).to(h_post.dtype),
        dh_res.reshape(h_res.shape).to(h_res.dtype),
    )


class _Site:
    """A site's module and sizes, for one state."""

    def __init__(self, spec: SiteSpec, X: torch.Tensor) -> None:
        self.spec = spec
        self.dtype = X.dtype
        self.device = X.device
        self.channels = X.shape[-1]
        self.tokens = X.shape[:-2].numel()
        self.target = target_of(X.device)
        self.module = load(source(spec, X.dtype))

    def tile(self, kernel: str) -> Tile:
        return tile(kernel, self.spec.streams, self.channels, self.dtype, self.target)

    def run(
        self, kernel: str, chosen: Tile, grid: Sequence[int], *arguments: torch.Tensor | int
    ) -> None:
        dense = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        with _on(self.device):
            getattr(self.module, kernel)[tuple(grid)](
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


def _blocks(size: int, chosen: Tile, name: str) -> int:
    return -(-size // int(chosen.constants[name]))
