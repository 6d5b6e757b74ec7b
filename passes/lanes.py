"""How one operation of the trunk acts on an n-stream state.

Between two sites a trunk may hold operations: a norm (post-norm models), an activation (ResNets), a
scale, a cast, a view. ``lane(op)(X)[i] = op(X[i])`` for every stream i, so equal streams stay
equal.
The state of a value of shape s with channel axis ``dim`` has shape ``s[:dim] + (n,) + s[dim:]``:
the
stream axis stands directly before the channel axis.

Each rule plans first (what is the channel axis of the result, or why can it not be done) and only
then emits, so that a refusal never leaves half a rewrite behind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import dims as sizes_of


@dataclass(frozen=True, slots=True)
class Lane:
    """The n-stream twin of a value: a node of shape ``s[:dim] + (n,) + s[dim:]``."""

    node: Node
    dim: int
    streams: int


@dataclass(frozen=True, slots=True)
class NotLiftable:
    """Why an operation cannot act on every stream alike."""

    reason: str


_UNARY = frozenset({
    "abs", "bfloat16", "celu", "clamp", "clamp_min", "clone", "contiguous", "cos", "detach",
    "double", "elu", "exp",
    "float", "gelu", "half", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid",
    "mish", "neg",
    "nan_to_num", "reciprocal", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin",
    "softplus", "softsign",
    "sqrt", "square", "tanh", "to", "_to_copy", "type",
})  # fmt: skip
_BINARY = frozenset(
    {"add", "div", "masked_fill", "maximum", "minimum", "mul", "pow", "rsub", "sub", "where"}
)
_DROPOUT = frozenset({"dropout", "native_dropout", "feature_dropout"})
_LAST_AXES_NORM = frozenset({"layer_norm", "rms_norm"})
_REDUCTION = frozenset({"amax", "amin", "mean", "std", "sum", "var"})
_RESHAPE = frozenset({"view", "reshape"})
_AXES = frozenset({"permute", "transpose"})


def plan_lane(node: Node, dims: Mapping[Node, int]) -> int | NotLiftable:
    """The channel axis (negative) of the n-stream twin of ``node``, or why there is none.

    Args:
        node: the operation.
        dims: channel axis of each operand that has streams.
    """
    name = op_name(node)
    operands = [arg for arg in node.all_input_nodes if arg in dims]
    if len({dims[arg] for arg in operands}) != 1:
        return NotLiftable(f"{name} joins values whose channel axes differ")
    dim = dims[operands[0]]
    rule = _rule(name)
    if rule is None:
        return NotLiftable(
            f"{name} mixes or moves channels in a way that has no per-stream form here"
        )
    return rule.plan(node, dim, dims)


def emit_lane(graph: Graph, node: Node, lanes: Mapping[Node, Lane]) -> Lane:
    """Insert the n-stream twin of ``node`` before it. `plan_lane` must have agreed."""
    name = op_name(node)
    rule = _rule(name)
    dims = {value: lane.dim for value, lane in lanes.items()}
    dim = plan_lane(node, dims)
    if rule is None or isinstance(dim, NotLiftable):
        raise AssertionError(f"{node} was planned as liftable, and is not")
    operand = next(lanes[arg] for arg in node.all_input_nodes if arg in lanes)
    with graph.inserting_before(node):
        twin = rule.emit(graph, node, lanes, operand)
    twin.meta = {
        k: v for k, v in node.meta.items() if k not in ("example_value", "val", "tensor_meta")
    }
    return Lane(twin, dim, operand.streams)


@dataclass(frozen=True, slots=True)
class _Rule:
    plan: Callable[[Node, int, Mapping[Node, int]], int | NotLiftable]
    emit: Callable[[Graph, Node, Mapping[Node, Lane], Lane], Node]


def _rule(name: str) -> _Rule | None:
    if name in _UNARY or name in _BINARY:
        return _Rule(_plan_elementwise, _emit_elementwise)
    if name in _DROPOUT:
        return _Rule(_plan_dropout, _emit_dropout)
    if name in _LAST_AXES_NORM:
        return _Rule(_plan_norm, _emit_copy)
    if name in _REDUCTION:
        return _Rule(_plan_reduction, _emit_reduction)
    if name in _RESHAPE:
        return _Rule(_plan_reshape, _emit_reshape)
    if name in _AXES:
        return _Rule(_plan_axes, _emit_axes)
    return None


# -- elementwise
# ------------------------------------------------------------------------------------


def _plan_elementwise(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    rank = len(sizes_of(node))
    for arg in node.all_input_nodes:
        other = len(sizes_of(arg))
        if arg in dims and other != rank:
            return NotLiftable(f"{op_name(node)} broadcasts the trunk to another rank")
        if other > rank:
            return NotLiftable(f"{op_name(node)} changes the rank of the trunk")
    return dim


def _emit_elementwise(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    def twin(arg: Node) -> Node:
        lane = lanes.get(arg)
        return lane.node if lane is not None else _beside_streams(graph, arg, operand.dim)

    args = map_arg(node.args, twin)
    kwargs = {k: v for k, v in map_arg(dict(node.kwargs), twin).items() if k != "memory_format"}
    if "inplace" in kwargs:
        kwargs["inplace"] = False
    return graph.create_node(node.op, node.target, tuple(args), kwargs)


def _beside_streams(graph: Graph, arg: Node, dim: int) -> Node:
    """A plain operand, with an axis of size 1 where its partner has the stream axis."""
    if len(sizes_of(arg)) <= -dim:
        return arg  # right-aligned broadcasting ends before the stream axis
    return graph.call_function(torch.unsqueeze, (arg, dim - 1))


# -- dropout
# ----------------------------------------------------------------------------------------


def _plan_dropout(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    return dim


def _emit_dropout(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    # One mask for all streams: with a mask each, equal streams would part and the function change.
    first = graph.call_function(torch.select, (operand.node, operand.dim - 1, 0))
    ones = graph.call_function(torch.ones_like, (first,))
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    mask = graph.create_node(node.op, node.target, (ones, *node.args[1:]), kwargs)
    mask = graph.call_function(torch.unsqueeze, (mask, operand.dim - 1))
    return graph.call_function(torch.mul, (operand.node, mask))


# -- norms and reductions over trailing axes
# ---------------------------------------------------------


def _plan_norm(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
    count = len(shape) if isinstance(shape, tuple | list) else 1
    if count > -dim:
        return NotLiftable(f"{op_name(node)} normalises over axes on both sides of the stream axis")
    return dim


def _emit_copy(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    return graph.node_copy(node, lambda arg: lanes[arg].node if arg in lanes else arg)


def _reduced_axes(node: Node) -> tuple[list[int], bool] | None:
    """(axes from the end, keepdim) of a reduction; None where they are not given as ints."""
    rank = len(sizes_of(node.all_input_nodes[0]))
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes) or not axes:
        return None
    return [int(a) - rank if int(a) >= 0 else int(a) for a in axes], keepdim is True


def _plan_reduction(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    axes = _reduced_axes(node)
    if axes is None or not axes[1]:
        return NotLiftable(f"{op_name(node)} reduces the trunk without keepdim")
    if min(axes[0]) < dim:
        return NotLiftable(f"{op_name(node)} reduces over axes before the channels")
    return dim


def _emit_reduction(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    reduced = _reduced_axes(node)
    assert reduced is not None
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("dim", "keepdim")}
    return graph.create_node(
        node.op, node.target, (operand.node, reduced[0], *node.args[2:3]),
        kwargs if len(node.args) > 2 else {**kwargs, "keepdim": True},
    )  # fmt: skip


# -- views
# -------------------------------------------------------------------------------------------


def _sizes(node: Node) -> tuple[Any, ...] | None:
    """The target sizes of a reshape as written: ``view(a, b)`` and ``view((a, b))`` alike."""
    sizes = node.args[1:] if len(node.args) != 2 else node.args[1]
    if len(node.args) < 2:
        sizes = node.kwargs.get("shape", node.kwargs.get("size"))
    if isinstance(sizes, tuple | list):
        return tuple(sizes)
    return (sizes,) if isinstance(sizes, int | Node) else None


def _plan_reshape(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    before, after, sizes = sizes_of(node.all_input_nodes[0]), sizes_of(node), _sizes(node)
    failed = NotLiftable(f"{op_name(node)} does not keep the channels as one axis")
    if sizes is None or len(sizes) != len(after):
        return failed
    axis = len(before) + dim
    if dim == -1:  # [..., C] -> [anything, C]
        return -1 if after and after[-1] == before[-1] else failed
    if list(after[: axis + 1]) == list(before[: axis + 1]):  # [B, C, H, W] -> [B, C, H * W]
        return axis - len(after)
    return failed


def _emit_reshape(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    before, after, sizes = sizes_of(node.all_input_nodes[0]), sizes_of(node), _sizes(node)
    assert sizes is not None
    axis = len(after) - 1 if operand.dim == -1 else len(before) + operand.dim
    # The channel size is written out: a -1 there could not be told from the stream axis.
    new = (*sizes[:axis], operand.streams, before[operand.dim], *sizes[axis + 1 :])
    return graph.call_method("reshape", (operand.node, new))


def _permutation(node: Node) -> list[int] | None:
    """Where each axis of the result comes from, as non-negative ints."""
    rank = len(sizes_of(node))
    given = node.args[1:] if len(node.args) != 2 else node.args[1]
    if not isinstance(given, tuple | list) or not all(isinstance(a, int) for a in given):
        return None
    axes = [int(a) % rank for a in given]
    if op_name(node) == "permute":
        return axes if len(axes) == rank else None
    if len(axes) != 2:
        return None
    order = list(range(rank))
    order[axes[0]], order[axes[1]] = axes[1], axes[0]
    return order


def _plan_axes(node: Node, dim: int, dims: Mapping[Node, int]) -> int | NotLiftable:
    order = _permutation(node)
    if order is None:
        return NotLiftable(f"{op_name(node)} with axes that are no constants")
    return order.index(len(order) + dim) - len(order)


def _emit_axes(graph: Graph, node: Node, lanes: Mapping[Node, Lane], operand: Lane) -> Node:
    order = _permutation(node)
    assert order is not None
    channel = len(order) + operand.dim  # also the position of the stream axis in the state
    new: list[int] = []
    for axis in order:
        if axis == channel:
            new.append(channel)
        new.append(axis if axis < channel else axis + 1)
    return graph.call_method("permute", (operand.node, new))
