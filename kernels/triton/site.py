"""`Site`: the generated kernels of one site, started with tensors of one state.

Nothing here waits for the device, but for the one run that times a kernel for `tune`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import like_phi
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import tune
from mhc_compile.kernels.triton.emit import kernels, replay_source, source
from mhc_compile.kernels.triton.emit_replay import replay_name
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.maps import Maps, maps_of
from mhc_compile.kernels.triton.targets import target_of
from mhc_compile.kernels.triton.tiles import (
    Tile,
    one_launch,
    owns_one_token,
    span,
    tile,
)


class Site:
    """A site's kernels and sizes, for one state."""

    def __init__(self, spec: SiteSpec, X: torch.Tensor, tokens: int | None = None) -> None:
        self.spec = spec
        self.dtype = X.dtype
        self.device = X.device
        self.channels = X.shape[-1]
        self.tokens = X.shape[:-2].numel() if tokens is None else tokens
        self.target = target_of(X.device)
        self.module = load(source(spec, X.dtype))
        self.choices = None
        if spec.autotune:
            self.choices = tune.choices(spec, X.dtype, self.channels, X.device)

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel: the one that was found to be the fastest, or that of the rule."""
        known = None if self.choices is None else self.choices.get(kernel)
        if known is not None:
            return known
        maps = maps_of(kernel, self.spec)
        return tile(kernel, maps, self.channels, self.dtype, self.target)

    def blocks(self, size: int, kernel: str, constant: str) -> int:
        """How many programs of a kernel share ``size``."""
        return -(-size // int(self.tile(kernel).constants[constant]))

    def one_launch(self, maps: Maps) -> bool:
        """Whether one kernel both projects the streams and reads them."""
        return one_launch(maps, self.channels, self.dtype, self.tokens, self.target)

    def room(self, *shape: int) -> torch.Tensor:
        """A float32 tensor to be written."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def mappings(
        self, shapes: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Room for h_post, h_res and saved."""
        h_post, h_res, saved = (self.room(*shape) for shape in shapes)
        if not constraint_of(self.spec).mixes:
            torch.eye(self.spec.streams, out=h_res)
        return h_post, h_res, saved

    def partial(self, maps: Maps) -> torch.Tensor:
        """Room for the sums of every slice of the channels."""
        slices = self.blocks(self.channels, f"{maps.prefix}_scan", "SLICE")
        return self.room(slices, self.tokens, maps.partial)

    def work(self, maps: Maps) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for numbers per token, and for sums per program, of the gradients of the logits."""
        programs = self.blocks(self.tokens, f"{maps.prefix}_backward_maps", "BT")
        sums = self.room(programs, maps.width + len(maps.groups))
        return self.room(self.tokens, maps.work), sums

    def phi_gradient(self, kernel: str, phi: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The gradient of phi: the part of every chunk of tokens, and their sum."""
        parts = self.room(-(-self.tokens // self.span(kernel)), *phi.shape)
        self.run(kernel, *tensors, parts)
        total = self.sum_rows(parts, phi.new_empty(phi.shape))
        return like_phi(total, phi)

    def span(self, kernel: str) -> int:
        """Tokens that one program of a kernel walks over."""
        return span(self.tokens, self.channels, self.tile(kernel))

    def sum_rows(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """``rows`` ``[r, ...]`` added over r, in the dtype and shape of ``like``."""
        count, columns = rows.shape[0], like.numel()
        most = int(self.tile("sum_rows").constants["SPAN"])
        while count > most:
            fewer = self.room(-(-count // most), columns)
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

    def start(self, kernel: str, *tensors: torch.Tensor) -> None:
        """Run a kernel of one program."""
        self._start(kernel, (1,), *tensors)

    def run(self, kernel: str, *tensors: torch.Tensor, **integers: int) -> None:
        """Run a kernel over all tokens and channels; ``integers`` are those besides T.

        With ``autotune`` the first run of a kernel that can be timed chooses its tile.
        """
        chosen, choices = self.tile(kernel), self.choices
        if (
            choices is not None
            and choices.get(kernel) is None
            and tune.can_time(self.device, self.tokens, self.target)
        ):
            chosen = choices.choose(
                kernel, chosen, lambda tile: self._run(kernel, tile, tensors, integers)
            )
        self._run(kernel, chosen, tensors, integers)

    def _run(
        self,
        kernel: str,
        chosen: Tile,
        tensors: Sequence[torch.Tensor],
        integers: Mapping[str, int],
    ) -> None:
        extents = self._extents(kernel, chosen)
        given = {"T": self.tokens, "SPAN": extents[-1][1]}
        given |= {name.upper(): value for name, value in integers.items()}
        wanted = kernels(self.spec)[kernel].integers
        grid = tuple(-(-size // step) for size, step in extents)
        numbers = [given[name] for name in wanted]
        self._launch(getattr(self.module, kernel), chosen, grid, *tensors, *numbers)

    def run_replay(self, posts: int, reads: int, *tensors: torch.Tensor) -> None:
        """Run the kernel that replays so many sites; the shorter ones are modules of their own."""
        name, module = replay_name(posts, reads), self.module
        if name not in kernels(self.spec):
            module = load(replay_source(self.spec, self.dtype, posts, reads))
        chosen = self.tile(name)
        grid = tuple(-(-size // step) for size, step in self._extents(name, chosen))
        self._launch(getattr(module, name), chosen, grid, *tensors)

    def _extents(self, kernel: str, chosen: Tile) -> list[tuple[int, int]]:
        """What each axis of a kernel's grid divides, and by what."""
        constants = chosen.constants
        if kernel.endswith(("_backward_streams", "_backward_phi")):
            return [(self.channels, int(constants["BC"])), (self.tokens, self.span(kernel))]
        tokens = (self.tokens, int(constants.get("BT", 1)))
        if kernel.endswith("_scan"):
            return [tokens, (self.channels, int(constants["SLICE"]))]
        if owns_one_token(kernel):
            return [tokens, (self.channels, int(constants["BC"]))]
        return [tokens]

    def _start(self, kernel: str, grid: tuple[int, ...], *arguments: torch.Tensor | int) -> None:
        self._launch(getattr(self.module, kernel), self.tile(kernel), grid, *arguments)

    def _launch(
        self, function: Any, chosen: Tile, grid: tuple[int, ...], *arguments: torch.Tensor | int
    ) -> None:
        dense = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        with on_device(self.device):
            function[grid](
                *dense,
                **chosen.constants,
                num_warps=chosen.warps,
                num_stages=chosen.stages,
                enable_fp_fusion=True,  # Triton 3.10 turns it off by default
            )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where kernels have to be launched: a context with the tensors' device as the current one."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)


def floats(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Coefficients and parameters as float32; the tensors themselves where they are."""
    return [tensor.float() for tensor in tensors]
