"""Decide, before anything is changed, which sites become part of which n-stream trunk.

Every refusal of the rewrite is made here, with its reason; `widen_trunks_pass` only carries out.

A site joins the trunk of the site before it when the value between them can be followed stream by
stream (`mhc_compile.passes.lanes`); otherwise a new trunk starts at its origin.
"""

from collections import ChainMap, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter

from torch.fx import Graph, Node

from mhc_compile.passes.aliases import AliasIndex
from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.lane import NotLiftable
from mhc_compile.passes.lanes import keeps_tokens, plan_lane
from mhc_compile.passes.layout import channel_axis
from mhc_compile.passes.sites import Residuals, ResidualSite
from mhc_compile.passes.trunks import RootSearch, branch_nodes
from mhc_compile.passes.values import describe, dims, dtype_of, is_state, rank


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """A site that will be rewritten."""

    index: int
    """Position in `Residuals.sites`."""
    site: ResidualSite
    trunk: int
    step: int
    """Position within its trunk, in graph order."""
    start: Node
    """The value the coefficients are made from: the origin, or the projected skip."""
    region: tuple[Node, ...]
    """On-trunk operations between the previous root and ``start``, ``start`` included."""
    branch: frozenset[Node]
    """Nodes of the branch: they read ``u`` where they read ``start``."""
    dim: int
    """Channel axis of ``start`` (negative)."""
    width: int
    """C, the size of that axis."""
    is_entry: bool
    """Whether the streams are made here (or arrive from another graph)."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a trunk enters or leaves its graph as one plain tensor."""

    value: Node
    """The graph input, or the value that is an output."""
    position: int
    """Index among the graph's inputs, or among its outputs."""
    dim: int
    """Channel axis (negative)."""
    region: tuple[Node, ...] = ()
    """On-trunk operations between the last root and an output that is not the root itself."""


@dataclass(slots=True)
class Plan:
    """What `widen_trunks_pass` will do."""

    sites: list[PlannedSite] = field(default_factory=list)
    left: dict[int, str] = field(default_factory=dict)
    """Site index -> why it stays a plain add."""
    trunks: list[list[PlannedSite]] = field(default_factory=list)
    """The same sites by trunk, in graph order."""
    arrivals: list[Boundary | None] = field(default_factory=list)
    """For each trunk, the graph input it starts from, if it does."""
    departures: list[Boundary | None] = field(default_factory=list)
    """For each trunk, the graph output that shows its end, if one does: it may go on elsewhere."""
    dims: dict[Node, int] = field(default_factory=dict)
    """Channel axis of every value that gets an n-stream twin."""

    def collapse_branches(self, indices: Container[int]) -> None:
        """Let the branches of these sites read the collapsed streams, as after a graph break."""
        for trunk in self.trunks:
            trunk[:] = [replace(p, branch=frozenset()) if p.index in indices else p for p in trunk]
        self.sites = [self.trunks[p.trunk][p.step] for p in self.sites]


def plan_trunks(
    graph: Graph,
    residuals: Residuals,
    refused: Mapping[int, str],
    starting: Container[int] = (),
    *,
    single_pass: bool = False,
) -> Plan:
    """Plan the rewrite of ``graph``.

    Args:
        graph: canonicalized.
        residuals: what `find_residuals` says of it.
        refused: site index -> reason, for sites the caller leaves out (excluded, no owner, ...).
        starting: sites that start streams of their own, whatever leads to them.
        single_pass: each site reads the streams by weights of the site before, token by token:
            where the trunk moves its tokens, it ends and another one starts.
    """
    return _Planner(graph, residuals, refused, starting, single_pass).run()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        residuals: Residuals,
        refused: Mapping[int, str],
        starting: Container[int],
        single_pass: bool,
    ) -> None:
        self.graph = graph
        self.starting = starting
        self.single_pass = single_pass
        self.residuals = residuals
        self.aliases = AliasIndex(graph)
        self.flow = FlowIndex(graph)
        self.plan = Plan(left=dict(refused))
        self.trunk_of: dict[int, int] = {}  # by site index
        self.trunk_at: dict[Node, int] = {}  # by value that gets an n-stream twin
        self.branches: dict[int, frozenset[Node]] = {}
        self.by_origin: dict[Node, list[int]] = defaultdict(list)
        for index, site in enumerate(residuals.sites):
            if index not in self.plan.left and not site.starts_at_skip:
                self.by_origin[site.origin].append(index)

    def run(self) -> Plan:
        for index, site in enumerate(self.residuals.sites):
            if index not in self.plan.left:
                reason = self._refusal(index, site) or self._place(index, site)
                if reason is not None:
                    self.plan.left[index] = reason
        self._find_boundaries()
        return self.plan

    def _refusal(self, index: int, site: ResidualSite) -> str | None:
        projected = site.starts_at_skip
        values = (site.root, site.skip, *(() if projected else (*site.skip_path, site.origin)))
        for value in values:
            if self.aliases.is_written(value):
                write = self.aliases.writes[self.aliases.base(value)][0]
                return (
                    f"{describe(write)} writes in place to a value of the trunk that is also "
                    "visible under another name: write it out of place, as in x = x + f(x)"
                )
        dtype = dtype_of(site.root)
        if dtype is None or not dtype.is_floating_point or not dims(site.root):
            return f"its sum is {dtype} of rank {rank(site.root)}: streams hold real channels"
        for other in self.by_origin[site.origin] if not projected else ():
            if other != index and site.root in self._branch(other):
                outer = describe(self.residuals.sites[other].root)
                return f"it lies in the branch of the site {outer} and starts from the same value"
        return None

    def _place(self, index: int, site: ResidualSite) -> str | None:
        """Add the site to the plan; the reason if that is not possible."""
        if site.starts_at_skip:
            # The skip runs once, on the collapsed streams, and new streams start from its result:
            # to project each stream would cost n times as much. The branch reads the collapse.
            return self._enter(index, site, site.skip, frozenset())
        link, plan = self.residuals.links[index], self.plan
        if index in self.starting:
            if site.origin in plan.dims:
                return (
                    f"it starts streams of its own, as at conversion, and here the streams of "
                    f"another site pass through {describe(site.origin)}"
                )
            return self._enter(index, site, site.origin, self._branch(index))
        new: dict[Node, int] = {}
        region: tuple[Node, ...] = ()
        trunk: int | None = None
        if site.origin in plan.dims:  # a fork: another site starts here too
            trunk = self.trunk_at[site.origin]
        elif link.previous in self.trunk_of and not self._crosses_branch(
            index, link.previous, link.region
        ):
            followed = self._follow(self.residuals.sites[link.previous].root, link.region)
            if followed is not None:
                new, trunk, region = followed, self.trunk_of[link.previous], link.region
        if trunk is None:
            return self._enter(index, site, site.origin, self._branch(index))
        return self._join(index, site, site.origin, trunk, region, self._branch(index), new)

    def _enter(
        self, index: int, site: ResidualSite, start: Node, branch: frozenset[Node]
    ) -> str | None:
        """Start a trunk at ``start``."""
        new = {start: channel_axis(start, branch)}
        return self._join(index, site, start, None, (), branch, new)

    def _join(
        self,
        index: int,
        site: ResidualSite,
        start: Node,
        trunk: int | None,
        region: tuple[Node, ...],
        branch: frozenset[Node],
        new: dict[Node, int],
    ) -> str | None:
        """Add the site to ``trunk``, or to a new one; the reason if its skip cannot be followed."""
        plan = self.plan
        known = ChainMap(new, plan.dims)
        dim = known[start]
        width = dims(start)[dim]
        if not isinstance(width, int):
            return f"the width of the trunk ({width}) is not a constant"
        for value in reversed(site.skip_path if start is site.origin else ()):
            planned = plan_lane(value, known)
            if isinstance(planned, NotLiftable):
                return f"the skip has no per-stream form: {planned.reason}"
            new[value] = planned
            if self.single_pass and not keeps_tokens(value, known):
                return (
                    f"the skip moves tokens ({describe(value)}), and single_pass has weights each"
                )
        new[site.root] = known[site.skip]
        is_entry = trunk is None
        if trunk is None:
            trunk = len(plan.trunks)
            plan.trunks.append([])
        self.trunk_of[index] = trunk
        plan.dims.update(new)
        self.trunk_at.update(dict.fromkeys(new, trunk))
        step = len(plan.trunks[trunk])
        entry = PlannedSite(index, site, trunk, step, start, region, branch, dim, width, is_entry)
        plan.sites.append(entry)
        plan.trunks[trunk].append(entry)
        return None

    def _follow(self, root: Node, region: tuple[Node, ...]) -> dict[Node, int] | None:
        """The channel axes of on-trunk operations; None if one has no per-stream form."""
        new: dict[Node, int] = {}
        known = ChainMap(new, self.plan.dims)
        for node in region:
            planned = plan_lane(node, known)
            if isinstance(planned, NotLiftable) or self.aliases.is_written(node):
                return None
            new[node] = planned
            if self.single_pass and not keeps_tokens(node, known):
                return None
        return new if root in known else None

    def _crosses_branch(self, index: int, previous: int, region: tuple[Node, ...]) -> bool:
        """Whether the way from the previous root to this origin runs inside another site's branch.

        Then this site belongs to that branch, reads ``u`` there, and starts a trunk of its own.
        """
        site = self.residuals.sites[index]
        for value in (self.residuals.sites[previous].root, *region):
            for other in self.by_origin[value]:
                if other != index and not self._branch(other).isdisjoint((site.origin, site.root)):
                    return True
        return False

    def _branch(self, index: int) -> frozenset[Node]:
        if index not in self.branches:
            site = self.residuals.sites[index]
            # What lies before a graph break has read the collapsed streams by then.
            nodes = () if site.crosses else branch_nodes(self.flow, site)
            self.branches[index] = frozenset(nodes)
        return self.branches[index]

    def _find_boundaries(self) -> None:
        plan = self.plan
        inputs = {n: i for i, n in enumerate(n for n in self.graph.nodes if n.op == "placeholder")}
        plan.departures = [None] * len(plan.trunks)
        for trunk in plan.trunks:
            start = trunk[0].start
            arrives = start in inputs and not is_state(start)
            plan.arrivals.append(Boundary(start, inputs[start], trunk[0].dim) if arrives else None)
        outputs = self.graph.output_node().args[0]
        if not plan.trunks or not isinstance(outputs, tuple | list):
            return
        lasts = {trunk[-1].site.root: trunk[-1].trunk for trunk in plan.trunks}
        search = RootSearch(
            self.flow, {site.root: i for i, site in enumerate(self.residuals.sites)}
        )
        ways: list[tuple[int, int, Node, Node]] = []
        for position, value in enumerate(outputs):
            root = search.above(value) if isinstance(value, Node) else None
            if root in lasts:
                ways.append(
                    (self.flow.position[value] - self.flow.position[root], position, value, root)
                )
        # The nearest: where a graph break cuts a branch, the norm that opens it is an output too.
        for _, position, value, root in sorted(ways, key=itemgetter(0, 1)):
            region = self.flow.between(root, (value,)) if value is not root else ()
            if plan.departures[lasts[root]] or any(node in plan.dims for node in region):
                continue
            followed = self._follow(root, region)
            if followed is not None:
                plan.dims.update(followed)
                plan.departures[lasts[root]] = Boundary(value, position, plan.dims[value], region)
