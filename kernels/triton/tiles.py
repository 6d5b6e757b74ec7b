"""Tiles by rule: for a kernel, streams, channels and dtype, the tile that each target runs.

A rule instead of a search, so that what was checked ahead of time is what runs.
"""

from dataclasses import dataclass

import torch

from mhc_compile.kernels.triton.maps import Maps, vector
from mhc_compile.kernels.triton.targets import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """How one kernel is compiled."""

    constants: dict[str, int | str]
    """Values of its ``tl.constexpr`` arguments."""
    warps: int
    stages: int = 1


ONE_TOKEN_BLOCKS = ("post", "expand", "collapse_mean", "collapse_sum", "static_pre", "static_seam")
"""Kernels whose programs own a block of the channels of one token."""


def tile(kernel: str, maps: Maps, channels: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: its name, one of `mhc_compile.kernels.triton.emit.kernels`.
        maps: of the site, or of its head for kernels of that.
        channels: width C.
        dtype: of the streams.
        target: where it runs.
    """
    per_warp = target.lanes * vector(dtype)  # channels that one warp covers with wide accesses
    width: dict[str, int | str] = {"C": channels}
    if kernel in ONE_TOKEN_BLOCKS:
        block = _fitting(channels, per_warp, 4 * per_warp)
        return Tile(constants={**width, "BC": block}, warps=block // per_warp)
    if "_static_maps" in kernel:
        return Tile(constants={}, warps=1)
    if kernel in ("post_backward", "static_pre_backward", "static_seam_backward"):
        return Tile(constants={**width, "BC": per_warp}, warps=1)
    if kernel == "sum_rows":
        return Tile(constants={"SPAN": 1024, "BR": 32, "BK": 64}, warps=4)
    if kernel == "sum_products":
        return Tile(constants={"BT": 64}, warps=2)
    if kernel.endswith("sum_maps"):
        return Tile(constants={"BR": 32}, warps=4)
    if kernel.endswith("_mix"):
        return Tile(constants={**width, "SLICE": _SLICE, "BT": 4, "BC": per_warp}, warps=4)
    if kernel.endswith("_backward_maps"):
        return Tile(constants={**width, "BT": 16, "BC": 64}, warps=4)
    products = {"PRECISION": target.precision}
    if kernel.endswith("_backward_streams"):
        return Tile(constants={**width, "BT": 16, "BC": 128, **products}, warps=8)
    if kernel.endswith("_backward_phi"):
        return Tile(constants={**width, "BT": 16, "BC": 64, **products}, warps=4)
    if kernel.endswith("_scan"):
        constants = {**width, "SLICE": _SLICE, "BT": 64, "BC": 32, **products}
        return Tile(constants=constants, warps=8, stages=2)
    return Tile(constants={**width, "BT": 32, "BC": 32, **products}, warps=4, stages=2)


_SLICE = 256
"""Channels whose sums one program of a scan makes."""


def one_launch(maps: Maps, channels: int, dtype: torch.dtype, tokens: int, target: Target) -> bool:
    """Whether a state is still in the caches when one kernel reads it for the second time.

    It also takes enough tokens for a program on every processor.
    """
    tokens_at_once = 32 * _PROGRAMS * target.units
    state = maps.streams * channels * dtype.itemsize
    return tokens >= 32 * target.units and tokens_at_once * state <= 0.8 * target.cache


_PROGRAMS = 2
"""Programs of a one-launch kernel that a processor is assumed to run at a time."""


def span(tokens: int, channels: int, chosen: Tile) -> int:
    """Tokens that one program of a ``..._backward_streams`` kernel walks over.

    Few enough programs that their parts of the gradient of phi are little beside the streams, and
    enough to fill a GPU. The same on every device, and so are the order of the sums and their bits.
    """
    slices = -(-channels // int(chosen.constants["BC"]))
    chunks = max(1, 512 // slices)
    block = int(chosen.constants["BT"])
    return -(-max(128, -(-tokens // chunks)) // block) * block


def _fitting(channels: int, least: int, most: int) -> int:
    """The power of two from ``least`` to ``most`` that pads the channels least; ties to more."""
    widths = []
    width = least
    while width <= most:
        widths.append(width)
        width *= 2
    return min(reversed(widths), key=lambda width: -(-channels // width) * width)
