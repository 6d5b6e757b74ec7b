"""Read a graph onward from one node: everything that is computed from it token by token."""

import heapq
from collections.abc import Callable, Collection

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.chain_scope import Scope
from mhc_compile.passes.chain_terms import NotExpressible
from mhc_compile.passes.chain_values import Value
from mhc_compile.passes.opnames import is_in_place

Stop = Callable[[Node, Value], bool]


def read_onward(scope: Scope, stop: Stop, skip: Collection[Node] = ()) -> None:
    """Fill ``scope.values`` with everything that can be read from its root.

    Args:
        scope: freshly made.
        stop: told of each value; True keeps its readers from being looked at.
        skip: nodes that are not read.
    """
    queue: list[Node] = []  # nodes compare by their place in the graph
    queued: set[Node] = set()

    def push(node: Node) -> None:
        for user in node.users:
            if user not in queued and user.op in ("call_function", "call_method"):
                queued.add(user)
                heapq.heappush(queue, user)

    push(scope.root)
    while queue:
        node = heapq.heappop(queue)
        if node in skip or is_in_place(node):
            continue
        try:
            known = scope.read(scope, node)
        except NotExpressible:
            continue
        scope.values[node] = known
        if not isinstance(known, Value) or not stop(node, known):
            push(node)


def without_gradient(graph: Graph) -> set[Node]:
    """Nodes inside of a ``torch.no_grad()`` of the model."""
    inside: set[Node] = set()
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            inside.add(node)
    return inside
