"""Where a widened graph can be cut in two, as the stages of a pipeline.

A cut is the state behind the post of a site, if everything after it needs no other value from
before it: on every way from the inputs to the outputs it comes along, which is to say that it
dominates them. What does not depend on the inputs (parameters, positions, masks of constants) is no
traffic: each side makes its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Graph, Node

from mhc_compile.passes.states import POST

_SOURCE = "inputs"


@dataclass(frozen=True, slots=True)
class Flow:
    """How the values of a graph come from its inputs."""

    moving: dict[Node, int]
    """Nodes that depend on an input or on random numbers, in graph order, and how many of the
    candidates lie before each."""
    candidates: list[Node]
    """The posts that dominate the output, in graph order."""
    cuts: list[Node]
    """Those of them that nothing bypasses on its way to an effect, such as an updated buffer."""


def find_flow(graph: Graph) -> Flow:
    """Follow the inputs of a graph of mhc ops, and find every place where it can be cut.

    Args:
        graph: after `widen_trunks_pass`, its seams not joined, without dead code.
    """
    ways = _ways(graph)
    dominator = nx.immediate_dominators(ways, _SOURCE)
    candidates: list[Node] = []
    node = dominator[graph.output_node()]
    while node != _SOURCE:
        if node.target is POST:
            candidates.insert(0, node)
        node = dominator[node]
    number = {node: index for index, node in enumerate(candidates)}
    moving = _count_before(ways, number)
    above: dict[Node, int] = {}
    bypassed: set[int] = set()
    for node, before in moving.items():
        parent = dominator[node]
        above[node] = 0 if parent == _SOURCE else above[parent] + (parent in number)
        if node.is_impure():  # of the candidates before it, how many dominate it?
            bypassed.update(range(above[node], before))
    cuts = [node for node in candidates if number[node] not in bypassed]
    return Flow(moving, candidates, cuts)


def parts_of(graph: Graph, flow: Flow, cuts: Sequence[Node]) -> dict[Node, int]:
    """The part that each moving node, and each effect on parameters or buffers, belongs to.

    Args:
        graph: as given to `find_flow`.
        flow: what that returned.
        cuts: some of ``flow.cuts``, in graph order.
    """
    positions = [flow.candidates.index(cut) for cut in cuts]
    parts: dict[Node, int] = {}
    part = 0
    for node in graph.nodes:
        if node in flow.moving:
            part = sum(position < flow.moving[node] for position in positions)
            parts[node] = part
        elif node.is_impure():  # a counter of calls: it stands beside the layer it counts for
            parts[node] = part
    return parts


def crossing(flow: Flow, post: Node) -> list[Node]:
    """What a cut at ``post`` would have to send besides its state: why it is none."""
    after: set[Node] = set()
    for node in flow.moving:
        if post in node.all_input_nodes or any(n in after for n in node.all_input_nodes):
            after.add(node)
    return [
        node
        for node in flow.moving
        if node not in after and node is not post and any(user in after for user in node.users)
    ]


def _ways(graph: Graph) -> nx.DiGraph:
    """The values that move, each with an edge from what it is made of."""
    ways = nx.DiGraph()
    for node in graph.nodes:
        origins = [source for source in node.all_input_nodes if source in ways]
        if not origins and (node.op in ("placeholder", "output") or _is_random(node)):
            origins = [_SOURCE]
        ways.add_edges_from((origin, node) for origin in origins)
    return ways


def _count_before(ways: nx.DiGraph, number: Mapping[Node, int]) -> dict[Node, int]:
    """How many candidates lie before each value; they follow each other, so the last one tells."""
    before: dict[Node, int] = {}
    for node in ways:
        if node != _SOURCE:
            origins = [n for n in ways.predecessors(node) if n != _SOURCE]
            before[node] = max((max(before[n], number.get(n, -1) + 1) for n in origins), default=0)
    return before


def _is_random(node: Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
