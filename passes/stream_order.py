"""The order in which the host issues kernels, so that a side stream has something to run beside.

    gradient, weight gradient, norm, SIDE   ->   gradient, norm, SIDE, weight gradient

A stream runs its kernels in order: what stands before a side kernel may delay it without having
anything to do with it. Such kernels go right behind it.
"""

import operator
from collections.abc import Collection, Mapping

from torch.fx import Graph, Node

from mhc_compile.passes.schedule import dependences


def deferred_order(graph: Graph, side: Collection[Node]) -> list[Node]:
    """The nodes of a graph, those that a side kernel need not come after right behind it.

    A node moves behind one side kernel at most, so that no value lives much longer.

    Args:
        graph: a functional graph; it stays as it is.
        side: its kernels on side streams.
    """
    before = dependences(list(graph.nodes))
    order: list[Node] = []
    segment: list[Node] = []
    for node in graph.nodes:
        segment.append(node)
        if node in side:
            needed = _needed(segment, node, before)
            order += [n for n in segment if n in needed]
            order += [n for n in segment if n not in needed]
            segment = []
    return [n for node in order + segment if not _is_part(node) for n in (node, *parts(node))]


def parts(node: Node) -> list[Node]:
    """What is taken out of a result of several values, which stays with it."""
    return [part for user in node.users if _is_part(user) for part in (user, *parts(user))]


def _is_part(node: Node) -> bool:
    return node.target is operator.getitem


def _needed(segment: list[Node], goal: Node, before: Mapping[Node, set[Node]]) -> set[Node]:
    """Of a segment that ends with ``goal``: itself, and what it has to come after."""
    needed = {goal}
    for node in reversed(segment):
        if node in needed or node.op in ("placeholder", "get_attr"):
            needed |= {node, *before[node]}
    return needed
