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
    """One residual add in one graph."""

    graph: int
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
    starts: bool | None = False
    """Whether its streams are made here; None while that is only known at run time."""
    continues: bool = False
    """Whether another site of the trunk follows."""

    @property
    def follows(self) -> bool:
        """Whether it takes over the streams of another site."""
        return self.planned is not None and self.starts is False


def site_uses(capture: Capture) -> list[SiteUse]:
    """All uses of a completed capture, in graph order; trunks are followed from graph to graph."""
    trunks, offsets = _number_trunks(capture.pieces, capture.graphs)
    lengths: dict[int, int] = {}
    for piece in capture.pieces:
        key = (piece.graph, piece.trunk)
        end = offsets[key] + len(capture.graphs[piece.graph].plan.trunks[piece.trunk])
        lengths[trunks[key]] = max(lengths.get(trunks[key], 0), end)
    uses = []
    for graph, analysis in enumerate(capture.graphs):
        for index, hosted in enumerate(analysis.hosted):
            site = analysis.residuals.sites[index]
            planned = next((p for p in analysis.plan.sites if p.index == index), None)
            if planned is None:
                uses.append(SiteUse(graph, site, hosted, None, analysis.plan.left[index]))
                continue
            key = (graph, planned.trunk)
            step = offsets[key] + planned.step
            uses.append(
                SiteUse(
                    graph, site, hosted, planned, "", trunks[key], step,
                    starts=step == 0, continues=step + 1 < lengths[trunks[key]],
                )
            )  # fmt: skip
    return uses


def first_uses(analysis: Analysis) -> list[SiteUse]:
    """Uses of one graph before it ran: where its trunks come from and go to is open."""
    plan = analysis.plan
    uses = []
    for index, hosted in enumerate(analysis.hosted):
        site = analysis.residuals.sites[index]
        planned = next((p for p in plan.sites if p.index == index), None)
        if planned is None:
            uses.append(SiteUse(0, site, hosted, None, plan.left[index]))
            continue
        last = planned.step + 1 == len(plan.trunks[planned.trunk])
        starts: bool | None = planned.step == 0
        if starts and plan.arrivals[planned.trunk] is not None:
            starts = None
        continues = not last or plan.departures[planned.trunk] is not None
        uses.append(
            SiteUse(0, site, hosted, planned, "", planned.trunk, planned.step, starts, continues)
        )
    return uses


def _number_trunks(
    pieces: Sequence[TrunkPiece], graphs: Sequence[Analysis]
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """(piece -> trunk of the model, piece -> number of sites before it in that trunk)."""
    trunks: dict[tuple[int, int], int] = {}
    offsets: dict[tuple[int, int], int] = {}
    for (
        piece
    ) in pieces:  # graphs come in the order they ran first, so a predecessor is numbered already
        key = (piece.graph, piece.trunk)
        before = piece.previous
        if before is None or (before.graph, before.trunk) not in trunks:
            trunks[key], offsets[key] = len(set(trunks.values())), 0
            continue
        previous = (before.graph, before.trunk)
        trunks[key] = trunks[previous]
        offsets[key] = offsets[previous] + len(graphs[before.graph].plan.trunks[before.trunk])
    return trunks, offsets
