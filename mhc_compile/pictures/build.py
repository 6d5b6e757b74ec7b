"""From a graph to a `GraphView`: collapse by module, hide what is no float, find repeated layers.

A box is a module call that holds no part of a trunk, and no module around it is one: in a
transformer layer the norm, the attention and the MLP. Operations that stand between such modules
are boxes of their own. Boxes are runs of consecutive operations, so that no edge points backwards.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from torch.fx import Graph, Node

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import carries_float, is_state, source_line
from mhc_compile.passes.vocabulary import LAYOUT
from mhc_compile.pictures.fold import fold_layers
from mhc_compile.pictures.labels import TRIVIAL, in_a_row, lines_of, short_path
from mhc_compile.pictures.trunks import Nesting, Spine
from mhc_compile.pictures.view import SPINE, GraphView, Kind, Role, ViewEdge, ViewNode

Collapse = Literal["auto", "none", "module", "layer"]
COLLAPSE: tuple[Collapse, ...] = ("auto", "none", "module", "layer")
MAX_NODES = 400


def build_view(
    graph: Graph,
    spine: Spine,
    nesting: Nesting,
    *,
    collapse: Collapse = "auto",
    fold: bool = True,
    max_nodes: int = MAX_NODES,
) -> GraphView:
    """Draw up the picture of a graph.

    Args:
        graph: before or after the rewrite.
        spine: its trunks.
        nesting: of its values.
        collapse: ``"none"`` one box an operation; ``"module"``; ``"layer"`` one box for all that
            stands between two parts of a trunk; ``"auto"`` as ``"module"``.
        fold: draw identical neighbouring layers once.
        max_nodes: a picture of more boxes is collapsed by layer, whatever ``collapse`` says.
    """
    level = "module" if collapse == "auto" else collapse
    view = _drawn(graph, spine, nesting, level, fold)
    if len(view.nodes) > max_nodes and level != "layer":
        smaller = _drawn(graph, spine, nesting, "layer", fold)
        note = f"{len(view.nodes)} boxes are more than {max_nodes}: collapsed by layer"
        view = replace(smaller, notes=(*smaller.notes, note))
    return view


def _drawn(graph: Graph, spine: Spine, nesting: Nesting, level: Collapse, fold: bool) -> GraphView:
    view = _Builder(graph, spine, nesting, level).run()
    return fold_layers(view) if fold else view


@dataclass(slots=True)
class _Group:
    """The operations of one box."""

    key: tuple[str, ...]
    nodes: list[Node] = field(default_factory=list)


class _Builder:
    def __init__(self, graph: Graph, spine: Spine, nesting: Nesting, level: Collapse) -> None:
        self.graph = graph
        self.spine = spine
        self.nesting = nesting
        self.level = level
        self.shared = self._calls_around_trunks()
        self.depths = self._depths()
        self.hidden = 0

    def run(self) -> GraphView:
        groups = self._groups()
        index = {node: i for i, group in enumerate(groups) for node in group.nodes}
        edges = self._edges(groups, index)
        nodes = [self._view_node(group) for group in groups]
        if self.level != "none":
            nodes, edges = _join_chains(nodes, edges)
        columns = _clear_of_trunks(nodes, edges)
        nodes = [replace(n, column=c) for n, c in zip(nodes, columns, strict=True)]
        notes = []
        if self.hidden:
            noun = "operation" if self.hidden == 1 else "operations"
            notes.append(f"not drawn: {self.hidden} {noun} on sizes, positions and masks")
        return GraphView(tuple(nodes), tuple(sorted(edges)), notes=tuple(notes))

    def _calls_around_trunks(self) -> frozenset[str]:
        """Module calls that hold a part of a trunk; without trunks, those of half the graph."""
        stacks = [list(_calls(node)) for node in self.spine.roles]
        if stacks:
            return frozenset(chain.from_iterable(stacks))
        everywhere = [list(_calls(n)) for n in self.graph.nodes if n.op.startswith("call_")]
        sizes = Counter(chain.from_iterable(everywhere))
        return frozenset(call for call, size in sizes.items() if 2 * size >= len(everywhere))

    def _depths(self) -> dict[Node, int]:
        depths: dict[Node, int] = {}
        for node in self.graph.nodes:
            known = self.nesting.depth.get(node.name)
            if known is None and node in self.spine.roles:  # an op: as the state it reads
                around = [n for n in node.all_input_nodes if n in self.spine.states and n in depths]
                known = depths[around[0]] if around else None
            depths[node] = known or 0
        # A module stands where most of it does: keys and values made from elsewhere beside queries.
        deepest: dict[str, int] = {}
        for node, depth in depths.items():
            module = self._module(node)
            deepest[module] = max(depth, deepest.get(module, 0))
        return {
            node: deepest[module] if (module := self._module(node)) else depth
            for node, depth in depths.items()
        }

    def _module(self, node: Node) -> str:
        """The outermost module call around ``node`` that holds no part of a trunk; "" if none."""
        if node in self.spine.roles:
            return ""
        return next((call for call in _calls(node) if call not in self.shared), "")

    def _groups(self) -> list[_Group]:
        groups: list[_Group] = []
        for node in self.graph.nodes:
            if node in self.spine.parts:
                continue
            if node.op == "placeholder" and not self._is_drawn_input(node):
                continue
            if node.op == "get_attr":
                continue
            is_plain = node.op.startswith("call_") and node not in self.spine.roles
            if is_plain and not carries_float(node):
                self.hidden += 1
                continue
            key = self._key(node)
            if not groups or groups[-1].key != key:
                groups.append(_Group(key))
            groups[-1].nodes.append(node)
        return groups

    def _is_drawn_input(self, node: Node) -> bool:
        return node in self.spine.states or (not is_state(node) and self._is_read(node))

    def _is_read(self, placeholder: Node) -> bool:
        return any(
            carries_float(user) or (op_name(user) in LAYOUT and self._is_read(user))
            for user in placeholder.users
        )

    def _key(self, node: Node) -> tuple[str, ...]:
        """Equal for neighbours that share a box."""
        calls = list(_calls(node))
        around = [call for call in calls if call in self.shared]
        depth = str(self.depths[node])
        if node.op in ("placeholder", "output"):
            return (node.op, node.name)
        if node in self.spine.roles or self.level == "none":
            return ("op", node.name)
        if self.level == "module" and self._module(node):
            return ("module", self._module(node))
        return ("between", around[-1] if around else "", depth)

    def _view_node(self, group: _Group) -> ViewNode:
        first, last = group.nodes[0], group.nodes[-1]
        paths = _calls(last)
        around = [path for call, path in paths.items() if call in self.shared]
        parent = around[-1] if around else ""
        role = self._role(group)
        parts = [self._part(node, parent) for node in group.nodes]
        site = self.spine.sites.get(first, "")
        return ViewNode(
            lines=lines_of(role, group.nodes, parts, site),
            role=role,
            column=self._column(group, role),
            path=parent,
            ops=len(group.nodes),
            title=" ".join(
                filter(None, (".".join(filter(None, (parent, parts[-1]))), source_line(last)))
            ),
        )

    def _part(self, node: Node, parent: str) -> str:
        """The module below ``parent`` that ``node`` belongs to; "" if it stands between modules."""
        if self.level == "none":
            return ""
        paths = _calls(node)
        inner = next((path for call, path in paths.items() if call not in self.shared), "")
        return short_path(inner, parent)

    def _column(self, group: _Group, role: Role) -> int:
        if role in ("input", "output"):  # a branch that reads the start of a trunk counts it in
            return 0
        return max(self.depths[node] for node in group.nodes) + (role == "pre")

    def _role(self, group: _Group) -> Role:
        first = group.nodes[0]
        if first.op == "placeholder":
            return "input"
        if first.op == "output":
            return "output"
        return self.spine.roles.get(first, "box")

    def _edges(self, groups: list[_Group], index: Mapping[Node, int]) -> list[ViewEdge]:
        edges: dict[tuple[int, int, Kind], int] = {}
        for target, group in enumerate(groups):
            for node in group.nodes:
                for source, value in self._sources(node, index):
                    if index[source] != target:
                        kind, streams = self._kind(value, node)
                        edges[index[source], target, kind] = streams
        return [ViewEdge(s, t, kind, streams) for (s, t, kind), streams in edges.items()]

    def _sources(self, node: Node, index: Mapping[Node, int]) -> Iterator[tuple[Node, Node]]:
        """(drawn node, the value of it that is read) for everything that ``node`` reads."""
        for value in node.all_input_nodes:
            source = self.spine.parts[value][0] if value in self.spine.parts else value
            while source not in index and op_name(source) in LAYOUT and source.all_input_nodes:
                source = source.all_input_nodes[0]
            if source in index:
                yield source, value

    def _kind(self, value: Node, reader: Node) -> tuple[Kind, int]:
        if (value, reader) in self.spine.steps:
            return "state", self.spine.states[value]
        if value in self.spine.parts:
            op, position = self.spine.parts[value]
            first_mapping = 1 if self.spine.roles[op] == "pre" else 2
            return ("coefficients" if position >= first_mapping else "data"), 1
        return "data", 1


def _calls(node: Node) -> dict[str, str]:
    """The module calls around ``node``, outermost first: what tells each apart -> its path."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return {f"{key} {path}": short_path(path, "") for key, (path, _) in stack.items() if path}


def _join_chains(
    nodes: list[ViewNode], edges: list[ViewEdge]
) -> tuple[list[ViewNode], list[ViewEdge]]:
    """One box for modules that only hand a value on: "conv1 -> bn1 -> act1"."""
    outgoing: dict[int, set[int]] = {}
    incoming: dict[int, set[int]] = {}
    for edge in edges:
        outgoing.setdefault(edge.source, set()).add(edge.target)
        incoming.setdefault(edge.target, set()).add(edge.source)
    kept: list[ViewNode] = []
    place: list[int] = []
    for i, node in enumerate(nodes):
        joined = None
        if kept and outgoing.get(i - 1) == {i} and incoming.get(i) == {i - 1}:
            joined = _joined(kept[-1], node)
        if joined is not None:
            kept[-1] = joined
        else:
            kept.append(node)
        place.append(len(kept) - 1)
    moved = {
        ViewEdge(place[e.source], place[e.target], e.kind, e.streams)
        for e in edges
        if place[e.source] != place[e.target]
    }
    return kept, sorted(moved)


def _joined(first: ViewNode, second: ViewNode) -> ViewNode | None:
    same = (first.role, first.column, first.path) == (second.role, second.column, second.path)
    names = [name for name in (first.lines[0], second.lines[0]) if name not in TRIVIAL]
    label = in_a_row(names or second.lines[:1])
    if not same or first.role != "box":
        return None
    ops = first.ops + second.ops
    size = second.lines[-1].rpartition("→ ")[2] if len(second.lines) > 1 else ""
    detail = f"{ops} ops → {size}" if size else f"{ops} ops"
    return replace(second, lines=(label, detail), ops=ops, title=f"{first.title} {second.title}")


def _clear_of_trunks(nodes: list[ViewNode], edges: list[ViewEdge]) -> list[int]:
    """Columns in which no box stands in the way of a trunk."""
    columns = [node.column for node in nodes]
    spans: dict[int, list[tuple[int, int]]] = {}
    for edge in edges:
        if edge.kind == "state" and columns[edge.source] == columns[edge.target]:
            spans.setdefault(columns[edge.source], []).append((edge.source, edge.target))
    for i, node in enumerate(nodes):
        if node.role not in SPINE:
            while any(a < i < b for a, b in spans.get(columns[i], ())):
                columns[i] += 1
    return columns
