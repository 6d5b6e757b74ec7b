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


_ONE_TOKEN_BLOCKS = (
    *("post", "mix", "post_backward_branch", "read_streams"),
    *("collapse_mean", "collapse_sum"),
    *("static_pre", "static_seam"),
)


def owns_one_token(kernel: str) -> bool:
    """Whether the programs of a kernel own a block of the channels of one token."""
    return kernel in _ONE_TOKEN_BLOCKS or kernel.startswith("replay")


_ONE_TOKEN = (
    *("post_backward", "post_backward_state", "read_streams_backward"),
    *("static_pre_backward", "static_seam_backward"),
)


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
    if owns_one_token(kernel):
        block = _fitting(channels, per_warp, 4 * per_warp)
        return Tile(constants={**width, "BC": block}, warps=block // per_warp)
    if "_static_maps" in kernel:
        return Tile(constants={}, warps=1)
    if kernel in _ONE_TOKEN:
        return Tile(constants={**width, "BC": per_warp}, warps=1)
    if kernel == "sum_rows":
        return Tile(constants={"SPAN": 1024, "BR": 32, "BK": 64}, warps=4)
    if kernel in ("sum_products", "sum_weights"):
        return Tile(constants={"BT": 64}, warps=2)
    if kernel.endswith("sum_maps"):
        return Tile(constants={"BR": 32}, warps=4)
    if kernel.endswith("_mix"):
        return Tile(constants={**width, "SLICE": _SLICE, "BT": 4, "BC": per_warp}, warps=4)
    tokens, block, warps, stages = _block(kernel, maps)
    constants = {**width, "BT": tokens, "BC": block}
    if not kernel.endswith("_backward_maps"):
        constants["PRECISION"] = target.precision
    if kernel.endswith("_scan"):
        constants["SLICE"] = _SLICE
    # Warps of 64 lanes are half as many, for the same number of elements a thread.
    return Tile(constants=constants, warps=warps * 32 // target.lanes, stages=stages)


def _block(kernel: str, maps: Maps) -> tuple[int, int, int, int]:
    """Tokens, channels, warps of 32 lanes and stages of a kernel that owns tokens by channels.

    Found by compiling: 128-bit accesses and no spilled register for up to four streams. More have
    smaller tiles, and spill.
    """
    few = maps.streams <= 4
    if kernel.endswith("_backward_maps"):
        return (16, 64, 4, 1) if few else (16, 32, 4, 1)
    has_more = maps.given and kernel == "seam_backward_streams"
    if few and (has_more or kernel == "seam_norm_backward_streams"):
        # With the gradients of H_pre, or through a norm, as well, 128-bit accesses would spill 72
        # bytes or more on NVIDIA's targets: these are of 64 bits.
        return (16, 64, 8, 1)
    if kernel.endswith("_backward_streams"):
        return (16, 128, 8, 1) if few else (16, 64, 8, 1)
    if kernel.endswith("_backward_phi"):
        return (16, 64, 4, 1) if few else (16, 16, 8, 1)
    if kernel.endswith("_scan"):
        return (64, 32, 8, 2) if few else (16, 32, 4, 1)
    return (32, 32, 4, 2) if few else (16, 32, 4, 1)


_SLICE = 256
"""Channels whose sums one program of a scan makes."""


def one_launch(maps: Maps, channels: int, dtype: torch.dtype, tokens: int, target: Target) -> bool:
    """Whether a state is still in the caches when one kernel reads it for the second time.

    It also takes enough tokens for a program on every processor, which is all that a single pass
    asks for.
    """
    block = _block(maps.prefix, maps)[0]
    if maps.given:
        return tokens >= block * target.units
    state = maps.streams * channels * dtype.itemsize
    at_once = block * _PROGRAMS * target.units * state
    return tokens >= block * target.units and at_once <= 0.8 * target.cache


_PROGRAMS = 2
"""Programs of a one-launch kernel that a processor is assumed to run at a time."""


def span(tokens: int, channels: int, chosen: Tile) -> int:
    """Tokens that one program of a kernel that owns channels walks over.

    Few enough programs that their parts of the gradient of phi are little beside the streams, and
    enough to fill a GPU.
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
