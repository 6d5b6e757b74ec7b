"""Per-stream rules for norms and reductions: what looks along axes of one stream."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.lane import Lane, Lanes, NotLiftable, Rule, state_axis
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import is_tensor, rank

# Where the axes stand among the arguments.
_AXES_AT = {
    **dict.fromkeys(("amax", "amin", "mean", "std", "sum", "var"), 1),
    **dict.fromkeys(("log_softmax", "softmax", "_softmax", "_log_softmax"), 1),
    **dict.fromkeys(("linalg_vector_norm", "norm", "normalize"), 2),
}

_AXES_NAMES = ("dim", "axis")


def _plan_last_axes(node: Node, dim: int) -> int | NotLiftable:
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
    count = len(shape) if isinstance(shape, tuple | list) else 1
    if count > -dim:
        return NotLiftable(f"{op_name(node)} normalises over axes on both sides of the stream axis")
    if not is_tensor(node) and not all(_takes_first(user) for user in node.users):
        return NotLiftable(f"the statistics of {op_name(node)} are read")
    return dim


def _takes_first(user: Node) -> bool:
    return user.target is operator.getitem and user.args[1:] == (0,)


def _emit_copy(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    return graph.node_copy(node, lambda arg: lanes[arg].node if arg in lanes else arg)


def _plan_group_norm(node: Node, dim: int) -> int | NotLiftable:
    if dim != 1 - rank(node):
        return NotLiftable("group_norm takes another axis for the channels")
    return dim


def _emit_group_norm(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    # Samples are normalised one by one, so that the streams can pass as samples.
    folded = graph.call_function(torch.flatten, (operand.node, 0, 1))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
    normed = graph.create_node(node.op, node.target, (folded, *node.args[1:]), kwargs)
    return graph.call_function(torch.unflatten, (normed, 0, (-1, operand.streams)))


def _given_axes(node: Node, at: int) -> Any:
    if len(node.args) > at:
        return node.args[at]
    return next((node.kwargs[name] for name in _AXES_NAMES if name in node.kwargs), None)


def _axes(node: Node) -> list[int] | None:
    """The axes an operation works along, from the end; None where they are not given as ints."""
    source, at = first_input(node), _AXES_AT[op_name(node)]
    given = _given_axes(node, at)
    listed = given if isinstance(given, tuple | list) else [given]
    # var(x, True): the flag is no axis
    axes = [axis for axis in listed if isinstance(axis, int) and not isinstance(axis, bool)]
    if source is None or not axes or len(axes) != len(listed):
        return None
    return [axis - rank(source) if axis >= 0 else axis for axis in axes]


def _plan_axes(node: Node, dim: int) -> int | NotLiftable:
    axes, source = _axes(node), first_input(node)
    if axes is None or source is None:
        return NotLiftable(f"{op_name(node)} reduces the whole trunk")
    if rank(node) == rank(source):
        return dim
    if dim in axes:
        return NotLiftable(f"{op_name(node)} reduces the channels away")
    return dim + sum(axis > dim for axis in axes)


def _emit_axes(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    axes, at = _axes(node), _AXES_AT[op_name(node)]
    assert axes is not None, "planned"
    moved = [state_axis(axis, operand.dim) for axis in axes]
    new = moved[0] if isinstance(_given_axes(node, at), int) else moved
    args = [new if i == at else arg for i, arg in enumerate(node.args)]
    kwargs = {key: new if key in _AXES_NAMES else value for key, value in node.kwargs.items()}
    if args:
        args[0] = operand.node
    else:
        kwargs["input"] = operand.node
    return graph.create_node(node.op, node.target, tuple(args), kwargs)


NORMS = {
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
        Rule(_plan_last_axes, _emit_copy),
    ),
    "group_norm": Rule(_plan_group_norm, _emit_group_norm),
}
"""Rules for norms; batch norms have none: their statistics would be those of all streams."""
REDUCTIONS = dict.fromkeys(_AXES_AT, Rule(_plan_axes, _emit_axes))
"""Rules for what reduces, or normalises, along given axes."""
