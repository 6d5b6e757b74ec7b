"""Where the trunks of a graph run: before the rewrite by its plan, afterwards by its mhc ops."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch.fx import Graph, Node

from mhc_compile.passes.lane import Lane
from mhc_compile.passes.opnames import raw_name
from mhc_compile.passes.plan import Plan
from mhc_compile.passes.states import EXPAND, spec_of
from mhc_compile.passes.values import dims, is_state
from mhc_compile.pictures.view import Role

_OPS: dict[str, Role] = {
    "mhc.expand": "expand",
    "mhc.pre": "pre",
    "mhc.post": "post",
    "mhc.seam": "seam",
    "mhc.seam_norm": "seam",
    "mhc.collapse": "collapse",
    "mhc.read": "collapse",
}
_STATE_OUTPUT: frozenset[Role] = frozenset({"expand", "post", "seam"})


@dataclass(frozen=True, slots=True)
class Nesting:
    """In how many branches a value lies, by its name: names outlive the rewrite."""

    depth: Mapping[str, int] = field(default_factory=dict)

    def with_lanes(self, lanes: Mapping[Node, Lane]) -> "Nesting":
        """The same, and for the n-stream twins of values."""
        twins = {lane.node.name: self.depth.get(node.name, 0) for node, lane in lanes.items()}
        return Nesting({**self.depth, **twins})


def nesting_of(plan: Plan) -> Nesting:
    """The nesting of all values of a planned graph."""
    depth: dict[str, int] = {}
    for name in chain.from_iterable((n.name for n in site.branch) for site in plan.sites):
        depth[name] = depth.get(name, 0) + 1
    return Nesting(depth)


@dataclass(slots=True)
class Spine:
    """The nodes of a graph that make up its trunks."""

    roles: dict[Node, Role] = field(default_factory=dict)
    """All of them but plain values at which a trunk starts."""
    states: dict[Node, int] = field(default_factory=dict)
    """Every value of a trunk, and its number of streams."""
    steps: set[tuple[Node, Node]] = field(default_factory=set)
    """(value, reader) where the trunk goes on."""
    parts: dict[Node, tuple[Node, int]] = field(default_factory=dict)
    """Results of mhc ops that return several -> (op, position)."""
    sites: dict[Node, str] = field(default_factory=dict)
    """Site names, where there are any."""


def planned_spine(plan: Plan, names: Mapping[int, str]) -> Spine:
    """The trunks of a graph that is not rewritten yet.

    Args:
        plan: of the graph.
        names: site index -> name.
    """
    spine = Spine()
    for planned in plan.sites:
        site = planned.site
        for node in planned.region:
            _carry(spine, node, spine.states)
        spine.states[planned.start] = 1
        local = {planned.start: 1}
        skip_path = reversed(site.skip_path) if planned.start is site.origin else ()
        for node in (*skip_path, *reversed(site.inner), site.root):
            if _carry(spine, node, local):
                local[node] = 1
        spine.roles[site.root] = "add"
        spine.sites[site.root] = names.get(planned.index, "")
    return spine


def _carry(spine: Spine, node: Node, known: Mapping[Node, int]) -> bool:
    """Note ``node`` as the continuation of a ``known`` trunk value, if it reads one."""
    source = next((n for n in node.all_input_nodes if n in known), None)
    if source is None:
        return False  # an inner add of branches alone
    spine.steps.add((source, node))
    spine.states[node] = 1
    spine.roles.setdefault(node, "trunk")
    return True


def rewritten_spine(graph: Graph) -> Spine:
    """The trunks of a graph of mhc ops; without any, an empty spine."""
    spine = Spine()
    for node in graph.nodes:
        role = _OPS.get(raw_name(node))
        if role is None:
            continue
        spine.roles[node] = role
        spine.sites[node] = str(node.meta.get("custom", {}).get("mhc", ""))
        if role in _STATE_OUTPUT and role != "seam":
            spine.states[node] = streams_of(node)
        if role != "expand":
            _follow_up(spine, node, node.args[0], streams_of(node))
        if role in ("pre", "seam"):
            for user in node.users:
                if raw_name(user) == "getitem":
                    spine.parts[user] = (node, int(user.args[1]))
                    if role == "seam" and user.args[1] == 0:
                        spine.states[user] = streams_of(node)
    return spine


def _follow_up(spine: Spine, reader: Node, state: object, streams: int) -> None:
    """Note the state an op reads, and the per-stream operations it went through."""
    while isinstance(state, Node):
        spine.steps.add((state, reader))
        if state in spine.states or state.op == "placeholder":
            spine.states.setdefault(state, streams)
            return
        spine.states[state] = streams
        made_of = [n for n in state.all_input_nodes if dims(n) == dims(state) and not is_state(n)]
        if state in spine.roles or state in spine.parts or not made_of:
            return
        spine.roles[state] = "trunk"
        state, reader = made_of[0], state


def streams_of(node: Node) -> int:
    """The number of streams an mhc op works on."""
    if node.target is EXPAND:
        return int(node.args[1])  # type: ignore[arg-type]
    return spec_of(node).streams
