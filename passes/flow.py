"""How floats flow through a graph: the index that every analysis of residuals asks.

Dependence runs along float and complex tensors and along tuples that hold them (clause 6 of the
residual definition): integers, booleans, sizes, constructors and random numbers cut it. A node that
writes in place (``y[:, 0] = f``) gives every later reader of ``y`` the written value.

The index is built in one pass. `FlowIndex.nearest` looks upward in reverse topological order and
stops at the first node wanted, so that a question costs as much as the part of the graph between
its two ends, however long the graph.

What a graph break hides can be told to the index: that one input of the graph was computed from
another one before (`Outside`).
"""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch.fx import Graph, Node

from mhc_compile.passes.opnames import is_in_place, op_name
from mhc_compile.passes.values import carries_float, is_state
from mhc_compile.passes.vocabulary import LAYOUT, makes_constant, traits

Outside = Mapping[Node, Mapping[Node, int]]
"""Input -> earlier inputs that it was computed from, outside of the graph, and the best way there:
an or of MIXES and BENDS."""
NOTHING: Outside = MappingProxyType({})

# A path has a kind: an or of MIXES, BENDS and, if its last node has one reader, SINGLE.
SINGLE = 4
_KINDS = 8
# _STEP[trait][paths]: a set of paths (bit k: there is one of kind k) after one more node.
_STEP = [
    [
        sum({1 << (kind | trait) for kind in range(_KINDS) if paths >> kind & 1})
        for paths in range(1 << _KINDS)
    ]
    for trait in range(4)
]


@dataclass(frozen=True, slots=True)
class Paths:
    """What lies on the ways from a node down to some leaves."""

    kinds: int

    def any(self, kind: int) -> bool:
        """Whether one way holds all of ``kind`` (an or of MIXES, BENDS and SINGLE)."""
        return any(self.kinds >> k & 1 and k & kind == kind for k in range(_KINDS))


class FlowIndex:
    """Float flow of one graph, which must not change while the index is used."""

    def __init__(self, graph: Graph, outside: Outside = NOTHING) -> None:
        self.nodes: tuple[Node, ...] = _in_order(graph, outside)
        self.position: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self._outside = outside
        self._read_outside = frozenset(source for ways in outside.values() for source in ways)
        self._inputs: list[tuple[int, ...]] = []
        self._traits: list[int] = []
        self._varies: list[bool] = []
        floats: list[bool] = []
        written: dict[Node, int] = {}  # value -> the last node that wrote into it
        for i, node in enumerate(self.nodes):
            sources = [written.get(n, self.position[n]) for n in node.all_input_nodes]
            if makes_constant(node):
                sources = []
            self._varies.append(_is_input(node) or any(self._varies[j] for j in sources))
            self._traits.append(traits(node) if node.op.startswith("call") else 0)
            target = _written_value(node)
            # y[0] = f has no value of its own, but passes floats on to the readers of y
            floats.append(carries_float(node if target is None else target))
            inputs = [j for j in sources if floats[j]]
            inputs += [self.position[source] for source in outside.get(node, ())]
            while target is not None:  # a view writes through to what it looks at
                if target in written:
                    inputs.append(written[target])
                written[target] = i
                target = _viewed_value(target)
                if target is not None and target not in written:
                    inputs.append(self.position[target])
            self._inputs.append(tuple(dict.fromkeys(inputs)))

    def inputs(self, node: Node) -> tuple[Node, ...]:
        """The nodes whose floats ``node`` reads."""
        return tuple(self.nodes[i] for i in self._inputs[self.position[node]])

    def readers(self, node: Node) -> int:
        """How many read the value; whatever reads it outside of the graph counts as one."""
        return len(node.users) + (node in self._read_outside)

    def varies(self, node: Node) -> bool:
        """Whether the value depends on a model input; parameters and random masks do not."""
        return self._varies[self.position[node]]

    def varying_inputs(self, node: Node) -> tuple[Node, ...]:
        """The `inputs` that vary."""
        return tuple(n for n in self.inputs(node) if self.varies(n))

    def nearest(
        self, leaves: Iterable[Node], wanted: Collection[Node]
    ) -> tuple[Node, Paths] | None:
        """The latest node of ``wanted`` that one of ``leaves`` depends on, and the ways down.

        A leaf that is itself wanted counts, with an empty way.
        """
        goals = {self.position[node] for node in wanted}
        floor = min(goals, default=len(self.nodes))
        reached: dict[int, int] = {}
        heap: list[int] = []
        for leaf in leaves:
            i = self.position[leaf]
            kind = 1 << (SINGLE if len(leaf.users) == 1 else 0)
            if i not in reached and i >= floor:
                heapq.heappush(heap, -i)
            reached[i] = reached.get(i, 0) | kind
        while heap:
            i = -heapq.heappop(heap)
            if i in goals:
                return self.nodes[i], Paths(reached[i])
            ways = self._outside.get(self.nodes[i])
            for j in self._inputs[i]:
                if j >= floor:
                    if j not in reached:
                        heapq.heappush(heap, -j)
                    kind = self._traits[i] if ways is None else ways[self.nodes[j]]
                    reached[j] = reached.get(j, 0) | _STEP[kind][reached[i]]
        return None

    def between(self, start: Node, ends: Iterable[Node]) -> tuple[Node, ...]:
        """Nodes on ways from ``start`` (excluded) to ``ends`` (included), in graph order."""
        first = self.position[start]
        stack = [i for i in (self.position[end] for end in ends) if i > first]
        above = set(stack)
        while stack:
            for j in self._inputs[stack.pop()]:
                if j > first and j not in above:
                    above.add(j)
                    stack.append(j)
        below = {first}
        for i in sorted(above):
            if not below.isdisjoint(self._inputs[i]):
                below.add(i)
        return tuple(self.nodes[i] for i in sorted(below - {first}))

    def depends(self, node: Node, on: Node) -> bool:
        """Whether ``node`` is ``on`` or depends on it."""
        return self.nearest((node,), (on,)) is not None


def _in_order(graph: Graph, outside: Outside) -> tuple[Node, ...]:
    """The nodes; of the inputs those first that others were computed from."""
    nodes = tuple(graph.nodes)
    if not outside:
        return nodes
    order: dict[Node, None] = {}

    def place(node: Node) -> None:
        for source in outside.get(node, ()):
            place(source)
        order[node] = None

    for node in nodes:
        if node.op == "placeholder":
            place(node)
    return (*order, *(node for node in nodes if node not in order))


def _is_input(node: Node) -> bool:
    return node.op == "placeholder" and not is_state(node)


def _written_value(node: Node) -> Node | None:
    """The value that ``node`` writes into; None if it writes nothing."""
    if op_name(node) == "setitem" or is_in_place(node):
        first = node.args[0] if node.args else None
        return first if isinstance(first, Node) else None
    out = node.kwargs.get("out")
    return out if isinstance(out, Node) else None


def _viewed_value(node: Node) -> Node | None:
    """What ``node`` is a view of: writing into ``node`` writes there too."""
    if op_name(node) in _VIEWS and node.args and isinstance(node.args[0], Node):
        return node.args[0]
    return None


_VIEWS = (LAYOUT - {"contiguous", "clone", "lift_fresh_copy"}) | {
    *("getitem", "slice", "select", "narrow", "expand", "expand_as", "chunk", "split", "unbind"),
    *("split_with_sizes", "diagonal", "as_strided", "unfold", "detach", "tensor_split"),
}
