"""Run work that a collective does not need between its start and its wait.

    start, wait, ..., work   ->   start, work, wait, ...

AOTAutograd puts the wait of a collective right behind its start. Here the nodes of a forward or
backward graph are put in another order, and nothing else: a collective starts as soon as its
operands are there, then comes what it did not need, and the wait when nothing else is left to do.
Where a branch ends in an all-reduce that is, forward, the mappings of its site (`split`), and in
the backward the gradients of weights and what recomputation makes again.

Paper: arXiv 2512.24880, section 4.3.3.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.collectives import is_collective, is_wait, waits_of_starts
from mhc_compile.passes.estimate import (
    Device,
    device_of,
    is_free,
    node_seconds,
    transfer_seconds,
)
from mhc_compile.passes.schedule import dependences, peak_bytes, reorder

_ORDER = "mhc_overlap_order"
"""Key of a graph's metadata: names of its nodes in the order that this pass gave them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What runs while one collective is pending, before and after the pass."""

    start: str
    """Name of the node that starts it."""
    nodes: tuple[int, int]
    """Operations between start and wait; views do not count."""
    seconds: tuple[float, float]
    """What they take, by `mhc_compile.passes.estimate`."""
    transfer: float
    """What the collective itself takes, by the same estimate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The windows of one graph, and what they cost."""

    windows: tuple[Window, ...]
    peak: tuple[int, int]
    """Most bytes live at once, before and after; without the graph's inputs."""


def overlap_collectives_pass(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    growth: float = 0.1,
    report: Callable[[Overlap], None] | None = None,
) -> PassResult:
    """Order the nodes of a lowered graph so that work runs while collectives are pending.

    Results are bitwise those of the graph as it was. Collectives keep their order, so that ranks
    agree; a mutating or impure node keeps its place among all others, a random one among those.

    Args:
        gm: a functional graph of ATen operations, as AOTAutograd makes it.
        example_inputs: ignored.
        growth: by how much the peak of live bytes may grow, as a share. Where it would grow more,
            nodes move less far.
        report: gets the windows if anything moved.
    """
    del example_inputs
    starts, nodes = waits_of_starts(gm.graph), list(gm.graph.nodes)
    if not starts or gm.meta.get(_ORDER) == [node.name for node in nodes]:
        return PassResult(gm, False)
    peak = peak_bytes(nodes)
    dependence, span = dependences(nodes), len(nodes)
    order = list_schedule(nodes, dependence, set(starts), span)
    while peak_bytes(order) > peak * (1 + growth):  # with a span of 0 it is the same
        span //= 2
        order = list_schedule(nodes, dependence, set(starts), span)
    gm.meta[_ORDER] = [node.name for node in order]
    if not reorder(gm.graph, order):
        return PassResult(gm, False)
    if report is not None:
        report(_overlap(starts, (nodes, order), device_of(gm.graph)))
    return PassResult(gm, True)


def list_schedule(
    nodes: Sequence[Node], before: Mapping[Node, set[Node]], starts: Set[Node], span: int
) -> list[Node]:
    """Put ``nodes`` in another order: of those that are ready always take the first of these.

    1. Inputs, and the next collective.
    2. What the next collective is made of.
    3. Everything else.
    4. Waits, and collectives without one, which block. The output.

    Ties break on the order of the program.

    Args:
        nodes: of a graph, in order.
        before: what each has to come after.
        starts: collectives that a wait belongs to.
        span: how far a node may run ahead of the first one that has not run.
    """
    index = {node: number for number, node in enumerate(nodes)}
    after: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in before[node]:
            after[source].append(node)
    missing = {node: len(before[node]) for node in nodes}
    leads_to = _next_starts(nodes, after, starts)
    # Of indices. What leads to a collective is in two of them, and taken from one.
    first, rest, blocking = list[int](), list[int](), list[int]()
    towards: dict[Node, list[int]] = {start: [] for start in starts}
    pending = deque(node for node in nodes if node in starts)
    done: dict[Node, None] = {}
    frontier = 0

    def add(node: Node) -> None:
        if node in starts or node.op in ("placeholder", "get_attr"):
            heappush(first, index[node])
        elif is_wait(node) or is_collective(node) or node.op == "output":
            heappush(blocking, index[node])
        else:
            heappush(rest, index[node])
            if node in leads_to:
                heappush(towards[leads_to[node]], index[node])

    def take() -> Node:
        for heap in (first, towards[pending[0]] if pending else [], rest, blocking):
            while heap and nodes[heap[0]] in done:
                heappop(heap)
            if heap and heap[0] <= frontier + span:
                return nodes[heappop(heap)]
        raise AssertionError("the first node that has not run is always ready")

    for node in nodes:
        if not missing[node]:
            add(node)
    while len(done) < len(nodes):
        node = take()
        done[node] = None
        while frontier < len(nodes) and nodes[frontier] in done:
            frontier += 1
        if pending and node is pending[0]:
            pending.popleft()
        for user in after[node]:
            missing[user] -= 1
            if not missing[user]:
                add(user)
    return list(done)


def _next_starts(
    nodes: Sequence[Node], after: Mapping[Node, Sequence[Node]], starts: Set[Node]
) -> dict[Node, Node]:
    """The first collective that each node leads to, of those that lead to one."""
    found: dict[Node, Node] = {}
    index = {node: number for number, node in enumerate(nodes)}
    for node in reversed(nodes):
        led = [found[user] for user in after[node] if user in found]
        if node in starts:
            found[node] = node
        elif led:
            found[node] = min(led, key=index.__getitem__)
    return found


def _overlap(
    starts: Mapping[Node, Sequence[Node]],
    orders: tuple[Sequence[Node], Sequence[Node]],
    device: Device,
) -> Overlap:
    before, after = (_windows(starts, nodes, device) for nodes in orders)
    windows = (
        Window(
            start=start.name,
            nodes=(before[start][0], after[start][0]),
            seconds=(before[start][1], after[start][1]),
            transfer=transfer_seconds(start, device),
        )
        for start in starts
    )
    first, second = (peak_bytes(nodes) for nodes in orders)
    return Overlap(windows=tuple(windows), peak=(first, second))


def _windows(
    starts: Mapping[Node, Sequence[Node]], nodes: Sequence[Node], device: Device
) -> dict[Node, tuple[int, float]]:
    """Operations between the start of every collective and its first wait, and their seconds."""
    done: dict[Node, tuple[int, float]] = {}  # up to a node
    count, seconds = 0, 0.0
    for node in nodes:
        done[node] = count, seconds
        if not is_free(node) and not is_collective(node):
            count, seconds = count + 1, seconds + node_seconds(node, device)
    found = {}
    for start, waits in starts.items():
        end = min((done[wait] for wait in waits), key=lambda item: item[0])
        found[start] = end[0] - done[start][0], end[1] - done[start][1]
    return found
