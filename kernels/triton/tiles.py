"""Tiles by rule: for a kernel, streams, channels and dtype, the tile that each target runs.

A rule instead of a search, so that what was checked ahead of time is what runs.
"""

from dataclasses import dataclass

import torch

from mhc_compile.kernels.triton.maps import power_of_two, vector


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the rules ask of a GPU."""

    name: str
    lanes: int
    """Threads per warp."""
    units: int
    """Processors that run one program each, or a few."""
    cache: int
    """Bytes of the last cache before memory."""
    precision: str
    """Of products of float32 tiles: "tf32" where the target has it, else "ieee"."""


_MIB = 1 << 20
TARGETS = {
    target.name: target
    for target in (
        Target(name="sm_80", lanes=32, units=108, cache=40 * _MIB, precision="tf32"),
        Target(name="sm_90", lanes=32, units=132, cache=50 * _MIB, precision="tf32"),
        Target(name="sm_100", lanes=32, units=148, cache=126 * _MIB, precision="tf32"),
        Target(name="gfx942", lanes=64, units=304, cache=256 * _MIB, precision="ieee"),
        Target(name="gfx950", lanes=64, units=256, cache=256 * _MIB, precision="ieee"),
    )
}
"""The targets that kernels are checked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """How one kernel is compiled."""

    constants: dict[str, int | str]
    """Values of its ``tl.constexpr`` arguments."""
    warps: int
    stages: int = 1


def tile(kernel: str, streams: int, channels: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: its name, one of `mhc_compile.kernels.triton.emit.kernels`.
        streams: number n of streams.
        channels: width C.
        dtype: of the streams.
        target: where it runs.
    """
    per_warp = target.lanes * vector(dtype)  # channels that one warp covers with wide accesses
    if kernel == "post":
        width = _fitting(channels, per_warp, 4 * per_warp)
        return Tile(constants={"C": channels, "BC": width}, warps=max(1, width // per_warp))
    if kernel == "post_backward":
        width = min(per_warp, power_of_two(channels))
        return Tile(constants={"C": channels, "BC": width}, warps=1)
    raise ValueError(kernel)


def _fitting(channels: int, least: int, most: int) -> int:
    """The power of two from ``least`` to ``most`` that pads the channels least; ties to more."""
    widths = []
    width = least
    while width <= most:
        widths.append(width)
        width *= 2
    return min(reversed(widths), key=lambda width: -(-channels // width) * width)
