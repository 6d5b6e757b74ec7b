"""Tiles by measurement: a few neighbours of a kernel's tile, timed once, kept on disk.

For sites with ``autotune`` only; the rule in `mhc_compile.kernels.triton.tiles` holds for all
others, and wherever nothing can be timed: while a graph is captured, for too few tokens to fill the
device, and in the interpreter. A choice is made per kernel, specification, width, dtype and device.
Nothing waits for the device once it is made.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.cpp.build import cache_directory
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import source
from mhc_compile.kernels.triton.targets import Target
from mhc_compile.kernels.triton.tiles import Tile

_LOG = logging.getLogger(__name__)
_WARPS = range(1, 17)
_STAGES = range(1, 4)
_PRODUCT_TOKENS = 16
"""Rows that ``tl.dot`` asks for at least."""
_MOST = 1 << 13
"""Elements of one stream that a program holds at most."""


def candidates(kernel: str, first: Tile) -> list[Tile]:
    """The tile of the rule, and those that differ from it in one number.

    Left as they are: numbers that the sizes of other tensors depend on (rows of partial sums).

    Args:
        kernel: its name.
        first: what `mhc_compile.kernels.triton.tiles.tile` gives.
    """
    return [first, *_neighbours(kernel, first)] if "BC" in first.constants else [first]


def _neighbours(kernel: str, first: Tile) -> Iterator[Tile]:
    for warps in (first.warps // 2, first.warps * 2):
        if warps in _WARPS:
            yield replace(first, warps=warps)
    has_products = "PRECISION" in first.constants
    if has_products:
        for stages in _STAGES:
            if stages != first.stages:
                yield replace(first, stages=stages)
    owns_channels = kernel.endswith(("_backward_streams", "_backward_phi"))
    names = [] if owns_channels else ["BC"]
    if not owns_channels and not kernel.endswith("_backward_maps"):
        names.append("BT")
    for name in names:
        now = int(first.constants.get(name, 0))
        for value in (now // 2, now * 2):
            tile = replace(first, constants={**first.constants, name: value})
            if value and _is_possible(tile, has_products=has_products):
                yield tile


def _is_possible(tile: Tile, *, has_products: bool) -> bool:
    tokens, channels = (int(tile.constants.get(name, 1)) for name in ("BT", "BC"))
    least = _PRODUCT_TOKENS if has_products else 1
    slices = int(tile.constants.get("SLICE", channels))
    return tokens >= least and 16 <= channels <= slices and tokens * channels <= _MOST


class Choices:
    """The tiles that were chosen for the kernels of one site, for one width and device."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tiles = _read(path)

    def get(self, kernel: str) -> Tile | None:
        """The tile of a kernel, if it was chosen."""
        return self._tiles.get(kernel)

    def choose(self, kernel: str, first: Tile, run: Callable[[Tile], object]) -> Tile:
        """Time the candidates of a kernel, and keep the fastest here and on disk.

        Args:
            kernel: its name.
            first: its tile by the rule.
            run: runs it with a tile; to be repeated at will.

        Raises:
            KernelError: the choice cannot be written.
        """
        tiles = candidates(kernel, first)
        times = [_seconds_or_never(tile, run) for tile in tiles]
        best = tiles[times.index(min(times))]
        _LOG.info("%s: %s of %d tiles, %.3g ms", kernel, best, len(tiles), min(times))
        self._tiles[kernel] = best
        # Others may have chosen for other kernels meanwhile.
        kept = {**_read(self._path), kernel: best}
        try:
            _write(self._path, {name: asdict(tile) for name, tile in kept.items()})
        except OSError as error:
            raise KernelError(
                f"the choice of tiles cannot be kept in {self._path.parent}: {error}; set "
                "MHC_COMPILE_CACHE to a directory of your own"
            ) from error
        return best


@cache
def choices_of(
    spec: SiteSpec, dtype: torch.dtype, channels: int, device: torch.device, directory: Path
) -> Choices:
    """The choices for a site; read from disk once a process.

    Args:
        spec: the site.
        dtype: of the streams.
        channels: width C.
        device: with its index.
        directory: where they are kept.
    """
    import triton

    words = (source(spec, dtype), str(channels), _device_name(device), triton.__version__)
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
    return Choices(directory / f"mhc_tiles_{key}.json")


def choices(spec: SiteSpec, dtype: torch.dtype, channels: int, device: torch.device) -> Choices:
    """`choices_of` in the cache of generated code."""
    return choices_of(spec, dtype, channels, device, cache_directory())


def can_time(device: torch.device, tokens: int, target: Target) -> bool:
    """Whether a launch may be repeated and waited for, and its time says anything."""
    if device.type == "cpu" or tokens < _PRODUCT_TOKENS * target.units:
        return False
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is None or not capturing()


def milliseconds(run: Callable[[], object]) -> float:
    """The shortest of some runs, with cold caches."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="min"))


def _seconds_or_never(tile: Tile, run: Callable[[Tile], object]) -> float:
    from triton.runtime.errors import TritonError

    try:
        return milliseconds(lambda: run(tile))
    except TritonError as error:  # more shared memory or registers than there are
        _LOG.info("%s does not fit: %s", tile, error)
        return float("inf")


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":  # interpreted
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def _read(path: Path) -> dict[str, Tile]:
    if not path.exists():
        return {}
    return {name: Tile(**fields) for name, fields in json.loads(path.read_text()).items()}


def _write(path: Path, data: object) -> None:
    # Renamed into place: none reads half of it.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        text = Path(name) / path.name
        text.write_text(json.dumps(data, indent=1))
        text.replace(path)
