"""The order in which the host issues kernels, so that a side stream has something to run beside.

    gradient, weight gradient, norm backward, SIDE   ->   gradient, norm backward, SIDE, weight gradient

A stream runs its kernels in order: what stands before a side kernel delays it, though it may have
nothing to do with it. Such kernels go right behind it.
"""

from collections.abc import Collection

from torch.fx import Graph, Node

from mhc_compile.passes.collectives import is_collective, is_wait


def deferred_order(graph: Graph, side: Collection[Node]) -> list[Node]:
    """The nodes of a graph, those that a side kernel need not wait for right behind it.

    Every node moves behind one side kernel at most, so that no value lives much longer. Nodes with
    side effects, random numbers and collectives stay in their order, and so does what they need.

    Args:
        graph: a functional graph; it stays as it is.
        side: its kernels on side streams.
    """
    order: list[Node] = []
    segment: list[Node] = []
    for node in graph.nodes:
        segment.append(node)
        if node in side:
            needed = _needed(segment, node)
            order += [n for n in segment if n in needed]
            moved = [n for n in segment if n not in needed]
            order += moved
            segment = []
    return order + segment


def _needed(segment: list[Node], goal: Node) -> set[Node]:
    """Of a segment that ends with ``goal``: what has to come before it, and itself."""
    needed = {goal}
    for node in reversed(segment):
        if node in needed or _stays(node):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


def _stays(node: Node) -> bool:
    return node.is_impure() or is_collective(node) or is_wait(node)
