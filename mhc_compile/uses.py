"""Each use of each site over all graphs of a model, with its place in its trunk.

A trunk may run through several graphs (graph breaks, blocks compiled one by one); a site may be
used
several times (shared layers).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_compile.analysis import Analysis
from mhc_compile.capture import Capture, TrunkPiece
from mhc_compile.hosts import HostedSite
from mhc_compile.passes.plan import PlannedSite
from mhc_compile.passes.sites import ResidualSite


@dataclass(frozen=True, slots=True)
class SiteUse:
    """One residual add in one run of a graph."""

    run: int
    """Which run of which graph, see `Capture.runs`."""
    site: ResidualSite
    hosted: HostedSite
    planned: PlannedSite | None
    """None for a site that is left alone."""
    reason: str
    """Why it is left alone."""
    trunk: int = -1
    """Number of its trunk in the whole model."""
    step: int = 0
    """Position in that trunk."""
    starts: bool = False
    """Whether its streams are made here."""
    continues: bool = False
    """Whether another site of the trunk follows."""

    @property
    def follows(self) -> bool:
        """Whether it takes over the streams of another site."""
        return self.planned is not None and not self.starts


def site_uses(capture: Capture) -> list[SiteUse]:
    """All uses of a completed capture, in graph order; trunks are followed from graph to graph."""
    trunks, offsets = _number_trunks(capture.pieces, capture.runs)
    lengths: dict[int, int] = {}
    for piece in capture.pieces:
        key = (piece.run, piece.trunk)
        end = offsets[key] + len(capture.runs[piece.run].plan.trunks[piece.trunk])
        lengths[trunks[key]] = max(lengths.get(trunks[key], 0), end)
    uses = []
    for run, analysis in enumerate(capture.runs):
        for index, hosted in enumerate(analysis.hosted):
            site = analysis.residuals.sites[index]
            planned = next((p for p in analysis.plan.sites if p.index == index), None)
            if planned is None:
                uses.append(SiteUse(run, site, hosted, None, analysis.plan.left[index]))
                continue
            key = (run, planned.trunk)
            step = offsets[key] + planned.step
            uses.append(
                SiteUse(
                    run, site, hosted, planned, "", trunks[key], step,
                    starts=step == 0, continues=step + 1 < lengths[trunks[key]],
                )
            )  # fmt: skip
    return uses


def uses_of_one(analysis: Analysis) -> list[SiteUse]:
    """All uses of a model that is one graph."""
    pieces = [TrunkPiece(0, trunk) for trunk in range(len(analysis.plan.trunks))]
    return site_uses(Capture([analysis], pieces, 1))


def _number_trunks(
    pieces: Sequence[TrunkPiece], runs: Sequence[Analysis]
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """(piece -> trunk of the model, piece -> number of sites before it in that trunk)."""
    trunks: dict[tuple[int, int], int] = {}
    offsets: dict[tuple[int, int], int] = {}
    for (
        piece
    ) in pieces:  # graphs come in the order they ran first, so a predecessor is numbered already
        key = (piece.run, piece.trunk)
        before = piece.previous
        if before is None or (before.run, before.trunk) not in trunks:
            trunks[key], offsets[key] = len(set(trunks.values())), 0
            continue
        previous = (before.run, before.trunk)
        trunks[key] = trunks[previous]
        offsets[key] = offsets[previous] + len(runs[before.run].plan.trunks[before.trunk])
    return trunks, offsets
