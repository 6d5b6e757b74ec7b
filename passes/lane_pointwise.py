"""Per-stream rules for what treats every element by itself: arithmetic, activations, dropout."""

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile.passes.lane import Lane, Lanes, NotLiftable, Rule
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import rank

_POINTWISE = frozenset({
    "abs", "add", "addcdiv", "addcmul", "alias", "atan2", "bfloat16", "celu", "clamp", "clamp_max",
    "clamp_min", "clip", "clone", "contiguous", "cos", "cpu", "cuda", "detach", "div", "double",
    "elu", "erf", "exp", "exp2", "expm1", "float", "gelu", "half", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "lerp", "lift_fresh_copy", "log", "log1p", "log_sigmoid",
    "logsigmoid", "masked_fill", "maximum", "minimum", "mish", "mul", "nan_to_num", "neg",
    "positive", "pow", "prims.convert_element_type", "reciprocal", "relu", "relu6", "rsqrt", "rsub",
    "selu", "sigmoid", "sign", "silu", "sin", "softplus", "softshrink", "softsign", "sqrt",
    "square", "sub", "tanh", "tanhshrink", "threshold", "to", "_to_copy", "true_divide", "type",
    "type_as", "where",
})  # fmt: skip
_DROPOUT = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"})


def _plan_pointwise(node: Node, dim: int) -> int | NotLiftable:
    for arg in node.all_input_nodes:
        if rank(arg) > rank(node):
            return NotLiftable(f"{op_name(node)} changes the rank of the trunk")
    return dim


def _emit_pointwise(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    def twin(arg: Node) -> Node:
        lane = lanes.get(arg)
        return lane.node if lane is not None else _beside_streams(graph, arg, operand.dim)

    # A memory format names an order of so many axes; the twin has one more.
    args = tuple(arg for arg in node.args if not isinstance(arg, torch.memory_format))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    return graph.create_node(node.op, node.target, map_arg(args, twin), map_arg(kwargs, twin))


def _beside_streams(graph: Graph, arg: Node, dim: int) -> Node:
    """A plain operand, with an axis of size 1 where its partner has the stream axis."""
    if rank(arg) <= -dim:
        return arg  # right-aligned broadcasting ends before the stream axis
    return graph.call_function(torch.unsqueeze, (arg, dim - 1))


def _plan_dropout(node: Node, dim: int) -> int | NotLiftable:
    return dim


def _emit_dropout(graph: Graph, node: Node, lanes: Lanes, operand: Lane) -> Node:
    # One mask for all streams: with a mask each, equal streams would part and the function change.
    first = graph.call_function(torch.select, (operand.node, operand.dim - 1, 0))
    ones = graph.call_function(torch.ones_like, (first,))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
    mask = graph.create_node(node.op, node.target, (ones, *node.args[1:]), kwargs)
    mask = graph.call_function(torch.unsqueeze, (mask, operand.dim - 1))
    return graph.call_function(torch.mul, (operand.node, mask))


POINTWISE = dict.fromkeys(_POINTWISE, Rule(_plan_pointwise, _emit_pointwise))
"""Rules for operations whose operands may all have streams, or be broadcast against them."""
DROPOUT = dict.fromkeys(_DROPOUT, Rule(_plan_dropout, _emit_dropout))
"""Rules for random masks."""
