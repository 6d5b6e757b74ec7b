"""Per-stream rules for what moves elements without changing them: views and permutations."""

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from mhc_compile.passes.axes import PERMUTATIONS, axis_order
from mhc_compile.passes.lane import Lane, Lanes, NotLiftable, Rule, state_axis
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims, dtype_of, is_tensor, rank

_RESHAPES = (
    "_unsafe_view", "flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view",
    "view_as",
)  # fmt: skip


def _channel_after(before: Sequence[Any], after: Sequence[Any], dim: int) -> int | None:
    """The axis (negative) that holds the channels after a reshape; None if it takes them apart.

    The channels stay one axis if equally many elements lie before it, or behind it.
    """
    axis = len(before) + dim
    outer, inner = math.prod(before[:axis]), math.prod(before[axis + 1 :])
    for i, size in enumerate(after):
        if size == before[axis] and (
            math.prod(after[:i]) == outer or math.prod(after[i + 1 :]) == inner
        ):
            return i - len(after)
    return None


def _plan_reshape(node: Node, dim: int) -> int | NotLiftable:
    source = first_input(node)
    if source is None or dtype_of(source) != dtype_of(node):
        return NotLiftable(f"{op_name(node)} reads the numbers as another dtype")
    before, after = dims(source), dims(node)
    found = _channel_after(before, after, dim)
    if found is None:
        return NotLiftable(f"{op_name(node)} does not keep the channels as one axis")
    if sum(not isinstance(size, int) and size not in before for size in after) > 1:
        return NotLiftable(f"{op_name(node)} has more than one size that is only known at run time")
    return found


def _emit_reshape(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    source = first_input(node)
    assert source is not None, "planned"
    before, after = dims(source), dims(node)
    dim = _channel_after(before, after, operand.dim)
    assert dim is not None, "planned"

    def written(size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size not in before:
            return -1
        axis = before.index(size)
        behind = axis >= len(before) + operand.dim
        return graph.call_method("size", (operand.node, axis + 1 if behind else axis))

    sizes = [written(size) for size in after]
    sizes.insert(len(after) + dim, operand.streams)
    return graph.call_method("reshape", (operand.node, tuple(sizes)))


def _plan_permutation(node: Node, dim: int) -> int | NotLiftable:
    order = axis_order(node)
    if order is None:
        return NotLiftable(f"{op_name(node)} moves axes that are no constants")
    return order.index(len(order) + dim) - len(order)


def _emit_permutation(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    order = axis_order(node)
    assert order is not None, "planned"
    channel = len(order) + operand.dim  # also the position of the stream axis in the state
    new: list[int] = []
    for axis in order:
        if axis == channel:
            new.append(channel)
        new.append(axis if axis < channel else axis + 1)
    return graph.call_method("permute", (operand.node, tuple(new)))


def _plan_getitem(node: Node, dim: int) -> int | NotLiftable:
    source = first_input(node)
    if source is None or not is_tensor(source):
        return dim  # the value among the results of a norm
    index = _slices(node, rank(source))
    if index is None:
        return NotLiftable("it takes a part of the trunk")
    if dims(node)[dim] != dims(source)[dim]:
        return NotLiftable("it takes a part of the channels")
    return dim


def _emit_getitem(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    source = first_input(node)
    index = _slices(node, rank(source)) if source is not None and is_tensor(source) else None
    if index is None:
        return graph.node_copy(node, lambda arg: lanes[arg].node if arg in lanes else arg)
    index.insert(len(index) + operand.dim, slice(None))
    return graph.call_function(operator.getitem, (operand.node, tuple(index)))


def _slices(node: Node, rank: int) -> list[slice] | None:
    """``x[:, 2:]`` as one slice an axis; None if the index holds anything else."""
    given = node.args[1]
    items = list(given) if isinstance(given, tuple | list) else [given]
    missing = [slice(None)] * (rank - len(items) + (Ellipsis in items))
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = missing
    slices = [item for item in items if isinstance(item, slice)]
    return slices if len(slices) == len(items) else None


def _plan_slice(node: Node, dim: int) -> int | NotLiftable:
    source = first_input(node)
    if source is None or (_slice_axis(node) == dim and dims(source) != dims(node)):
        return NotLiftable(f"{op_name(node)} takes a part of the channels")
    return dim


def _emit_slice(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    axis = state_axis(_slice_axis(node), operand.dim)
    args = (operand.node, axis, *node.args[2:])
    return graph.create_node(node.op, node.target, args, dict(node.kwargs))


def _slice_axis(node: Node) -> int:
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(axis, int)
    return axis - rank(node) if axis >= 0 else axis


VIEWS = {
    **dict.fromkeys(_RESHAPES, Rule(_plan_reshape, _emit_reshape)),
    **dict.fromkeys(PERMUTATIONS, Rule(_plan_permutation, _emit_permutation)),
    "getitem": Rule(_plan_getitem, _emit_getitem),
    "slice": Rule(_plan_slice, _emit_slice),
}
"""Rules for views and slices; the channels must stay one axis, and whole."""
