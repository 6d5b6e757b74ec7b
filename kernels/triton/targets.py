"""`Target`: what the rules for tiles ask of a GPU."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A kind of GPU; the numbers of its caches and processors order tiles, they time nothing."""

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


def target_of(device: torch.device) -> Target:
    """The target whose tiles a device gets; the interpreter, on the CPU, has those of sm_90."""
    if device.type == "cpu":
        return TARGETS["sm_90"]
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return _target_of(device.type, index)


@cache
def _target_of(kind: str, index: int) -> Target:
    properties = torch.get_device_module(kind).get_device_properties(index)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    if kind == "cuda" and not torch.version.hip:
        name = f"sm_{properties.major}{properties.minor}"
    if name in TARGETS:
        return TARGETS[name]
    # A relative of those that are checked, with caches and processors of its own.
    nvidia = name.startswith("sm_")
    return Target(
        name=name or kind,
        lanes=64 if name.startswith("gfx9") else 32,
        units=getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count,
        cache=getattr(properties, "L2_cache_size", 0) or 16 * _MIB,
        precision="tf32" if nvidia else "ieee",
    )
