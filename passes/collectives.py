"""Collectives of functional graphs: what starts one, and what waits for it.

``y = all_reduce(x, "sum", group)`` only starts; ``wait_tensor(y)`` gives the result. AOTAutograd
puts the two next to each other, for hand-written functional collectives and for DTensor alike.
"""

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

_WAIT = "_c10d_functional::wait_tensor"
_GROUP = "group_name"


def is_wait(node: Node) -> bool:
    """Whether the node waits for a collective."""
    return isinstance(node.target, OpOverload) and node.target._schema.name == _WAIT


def is_collective(node: Node) -> bool:
    """Whether all ranks of a group have to reach the node in the same order as other such nodes.

    Told by the argument that names the group, so that collectives outside of
    ``_c10d_functional`` (DTensor's ``shard_dim_alltoall``, symmetric memory) count as well.
    """
    if not isinstance(node.target, OpOverload):
        return False
    return any(argument.name == _GROUP for argument in node.target._schema.arguments)


def waits_of_starts(graph: Graph) -> dict[Node, list[Node]]:
    """The waits of every collective that has some, in the order of the graph.

    A collective on a list of tensors has one for each.
    """
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if is_wait(node):
            start = node.args[0]
            while start.target is operator.getitem:
                start = start.args[0]
            if is_collective(start):
                found.setdefault(start, []).append(node)
    return {node: found[node] for node in graph.nodes if node in found}


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors in a node's value: one, or those of a tuple or list."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return []
