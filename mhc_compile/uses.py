"""Each use of each site over all graphs of a model, with its place in its trunk.

A trunk may run through several graphs (graph breaks, blocks compiled one by one); a site may be
used several times (shared layers).
"""

from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from mhc_compile.analysis import Analysis
from mhc_compile.capture import Capture, TrunkPiece
from mhc_compile.hosts import HostedSite
from mhc_compile.passes.plan import PlannedSite
from mhc_compile.passes.sites import ResidualSite

_Step = tuple[int, int]
"""(run, index of the site in `Residuals.sites`)."""


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
    chain = _chain(capture)
    trunks = {
        step: number
        for number, members in enumerate(nx.weakly_connected_components(chain))
        for step in members
    }
    depths = {
        step: depth
        for depth, steps in enumerate(nx.topological_generations(chain))
        for step in steps
    }
    uses = []
    for run, analysis in enumerate(capture.runs):
        planned = {site.index: site for site in analysis.plan.sites}
        for index, hosted in enumerate(analysis.hosted):
            site, step = analysis.residuals.sites[index], (run, index)
            if index not in planned:
                uses.append(SiteUse(run, site, hosted, None, analysis.plan.left[index]))
                continue
            uses.append(
                SiteUse(
                    run,
                    site,
                    hosted,
                    planned[index],
                    "",
                    trunks[step],
                    depths[step],
                    starts=chain.in_degree(step) == 0,
                    continues=chain.out_degree(step) > 0,
                )
            )
    return uses


def _chain(capture: Capture) -> "nx.DiGraph[_Step]":
    """Which use hands its streams to which, over all runs, in the order they ran."""
    chain: nx.DiGraph[_Step] = nx.DiGraph()
    for run, analysis in enumerate(capture.runs):
        chain.add_nodes_from((run, site.index) for site in analysis.plan.sites)
        for trunk in analysis.plan.trunks:
            chain.add_edges_from(((run, a.index), (run, b.index)) for a, b in pairwise(trunk))
    for piece in capture.pieces:
        before = piece.previous
        if before is not None:
            last = capture.runs[before.run].plan.trunks[before.trunk][-1]
            first = capture.runs[piece.run].plan.trunks[piece.trunk][0]
            chain.add_edge((before.run, last.index), (piece.run, first.index))
    return chain


def new_uses(analysis: Analysis, known: Container[int]) -> list[SiteUse]:
    """The uses of hosts without parameters, in a model that is one graph.

    Args:
        analysis: of the graph.
        known: indices of the sites that have parameters.
    """
    fresh = {id(analysis.host_of(p)) for p in analysis.plan.sites if p.index not in known}
    pieces = [TrunkPiece(0, trunk) for trunk in range(len(analysis.plan.trunks))]
    uses = site_uses(Capture([analysis], pieces, 1))
    return [use for use in uses if id(use.hosted.host) in fresh]
