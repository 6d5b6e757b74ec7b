"""What a converted model keeps for its backward, from its report alone.

Everything beside the branches' own activations, which no setting changes: the n-stream states, the
branch outputs and the mappings of the sites.

Paper: arXiv 2512.24880, section 4.3.2, table 3 and equation (20).
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mhc_compile.kernels.constraints import constraint_named
from mhc_compile.passes.recompute import block_length
from mhc_compile.report import Report, Site, Trunk

_COEFFICIENT = 4  # bytes: mappings are float32


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkMemory:
    """One trunk; all sizes in bytes for one call with the example inputs."""

    index: int
    sites: int
    tokens: int
    """Positions that have a state each; a dynamic size counts as 1."""
    width: int
    block: int
    """Sites per block, L_r; 0 if nothing is recomputed, as in a trunk of one site."""
    blocks: int
    states: int
    """Kept states: one n C where a block starts, C for the first, which starts from the entry."""
    branches: int
    """Kept branch outputs, C a site."""
    mappings: int
    """At most this for mappings and logits, 2 (n^2 + 2 n) a site."""
    replay: int
    """What the block being replayed holds for a while, (n + 2) C a site."""
    without: int
    """What would be kept without recomputation: every state, branch output and mapping."""
    rows: int
    """Extra work: rows of C that a step moves once more. A replay of known mappings reads the state
    of its block and moves n + 2 rows a site; static sites are made again op by op, 2 n + 2."""

    @property
    def kept(self) -> int:
        """What is kept until the backward reaches it."""
        return self.states + self.branches + self.mappings

    @property
    def peak(self) -> int:
        """`kept`, and the block being replayed."""
        return self.kept + self.replay


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What every trunk keeps; the first ``block`` sites are a block, the next another, ..."""

    model: str
    recompute: int | str
    trunks: tuple[TrunkMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, with `TrunkMemory.kept` and `TrunkMemory.peak`."""
        content = asdict(self)
        for entry, trunk in zip(content["trunks"], self.trunks, strict=True):
            entry |= {"kept": trunk.kept, "peak": trunk.peak}
        return content

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plan as JSON text, keys sorted."""
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)


def memory_plan(report: Report) -> MemoryPlan:
    """Plan of a report that `mhc_compile.explain` or `mhc_compile.convert_` returned.

    Sites that the model checkpoints itself keep less; they are counted like the others.
    """
    sites = {site.name: site for site in report.sites}
    return MemoryPlan(
        model=report.model,
        recompute=report.config["recompute"],
        trunks=tuple(
            _trunk(trunk, sites[trunk.sites[0]], report.config) for trunk in report.trunks
        ),
    )


def _trunk(trunk: Trunk, site: Site, config: dict[str, Any]) -> TrunkMemory:
    n, count, recompute = config["streams"], len(trunk.sites), config["recompute"]
    elements = math.prod(size for size in site.shape if isinstance(size, int))
    row = elements * getattr(torch, site.dtype).itemsize  # C of every token
    tokens = elements // trunk.width
    mixing = constraint_named(config["constraint"]).logits(n)
    mapping = 2 * (2 * n + mixing) * tokens * _COEFFICIENT
    block = 0
    if recompute != "off" and count > 1:
        block = block_length(count, n) if recompute == "auto" else min(recompute, count)
    blocks = -(-count // block) if block else 0
    everything = count * ((n + 1) * row + mapping)
    return TrunkMemory(
        index=trunk.index,
        sites=count,
        tokens=tokens,
        width=trunk.width,
        block=block,
        blocks=blocks,
        states=(row + (blocks - 1) * n * row) if block else count * n * row,
        branches=count * row,
        mappings=count * mapping,
        replay=(n + 2) * block * row,
        without=everything,
        rows=_replayed_rows(count, blocks, n, dynamic=config["dynamic"]),
    )


def _replayed_rows(sites: int, blocks: int, n: int, *, dynamic: bool) -> int:
    if not blocks:
        return 0
    reads, seams = blocks * (n + 1), sites - blocks  # the first site of a block is only read
    return reads + seams * (n + 2 if dynamic else 2 * n + 2)
