"""Put the nodes of a graph in another order: what must stay in order, and what is live when.

A node comes after the values that it reads. Beyond that a mutating or otherwise impure node stays
where it is among all others, random numbers are drawn in the order of the program, and collectives
start in that order too, since every rank has to agree on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from mhc_compile.passes.collectives import is_collective, is_wait, tensors
from mhc_compile.passes.estimate import bytes_of, shows_operand
from mhc_compile.passes.values import value_of


def dependences(nodes: Sequence[Node]) -> dict[Node, set[Node]]:
    """What each node has to come after: its operands, and the fixed orders named above."""
    before = {node: set(node.all_input_nodes) for node in nodes}
    for fixed in (is_collective, is_random):
        for first, second in pairwise(filter(fixed, nodes)):
            before[second].add(first)
    barrier, segment = None, list[Node]()
    for node in nodes:
        if barrier is not None:
            before[node].add(barrier)
        if is_barrier(node):
            before[node].update(segment)
            barrier, segment = node, []
        else:
            segment.append(node)
    return before


def is_barrier(node: Node) -> bool:
    """Whether nothing may move across the node: it writes, or torch cannot tell what it does."""
    if is_wait(node) or node.op in ("placeholder", "get_attr", "output"):
        return False
    if isinstance(node.target, OpOverload):
        impure = node.is_impure(impure_random=False) and not is_collective(node)
        return impure or bool(node.target._schema.is_mutable)
    return node.op != "call_function" or isinstance(node.target, HigherOrderOperator)


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers from a generator."""
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def reorder(graph: Graph, order: Sequence[Node]) -> bool:
    """Put all nodes in ``order``; returns whether that changed anything."""
    if list(graph.nodes) == list(order):
        return False
    for first, second in pairwise(order):
        first.append(second)
    return True


def peak_bytes(nodes: Iterable[Node]) -> int:
    """The most bytes that are live at once while ``nodes`` run one after the other.

    Results of views belong to the value they show. Inputs of the graph, which its caller owns, do
    not count, and its outputs stay.
    """
    owner: dict[Node, Node] = {}
    size: dict[Node, int] = {}
    readers: dict[Node, int] = {}
    nodes = list(nodes)
    for node in nodes:
        if shows_operand(node):
            owner[node] = owner[node.all_input_nodes[0]]
        else:
            owner[node] = node
            size[node] = bytes_of(tensors(value_of(node))) if node.op == "call_function" else 0
            readers[node] = 0
        for user in node.users:
            readers[owner[node]] += 1 if user.op != "output" else 2  # which never runs
    live = peak = 0
    for node in nodes:
        live += size.get(node, 0)
        peak = max(peak, live)
        for source in node.all_input_nodes:
            readers[owner[source]] -= 1
            if not readers[owner[source]]:
                live -= size[owner[source]]
    return peak


def stable_order(nodes: Sequence[Node], before: Mapping[Node, set[Node]]) -> list[Node]:
    """The nodes so that each comes after what ``before`` names, moved no more than that takes."""
    number = {node: at for at, node in enumerate(nodes)}
    left = {node: len(before[node]) for node in nodes}
    after: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in before[node]:
            after[source].append(node)
    ready = [at for node, at in number.items() if not left[node]]  # sorted, and so a heap
    order = []
    while ready:
        node = nodes[heappop(ready)]
        order.append(node)
        for reader in after[node]:
            left[reader] -= 1
            if not left[reader]:
                heappush(ready, number[reader])
    return order
