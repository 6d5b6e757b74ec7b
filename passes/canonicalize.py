"""Bring a captured graph to one form, before anything is looked for in it.

    checkpoint(body, x)    ->  the operations of body, tagged for recomputation
    x += f;  relu_(x)      ->  x1 = x + f;  x2 = relu(x1)      where nobody else sees the write
    torch.add(x, f, alpha) ->  x + alpha * f
    x[1:] + f(x[1:])       ->  s + f(s)  with s = x[1:]        see `slices`
    x.to(x.dtype)          ->  x                               and torch.export's checks of it go

The result computes what the graph computed. A write that somebody else could see is left as it is;
`find_residuals` and `plan_trunks` then refuse the sites it touches.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.aliases import AliasIndex
from mhc_compile.passes.opnames import first_input, inplace_flag, is_in_place, op_name, raw_name
from mhc_compile.passes.slices import merge_equal_slices
from mhc_compile.passes.values import (
    RECOMPUTE,
    REGION,
    VALUE_KEYS,
    dtype_of,
    meta_of_part,
    value_of,
)

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

# In-place operators, and the function that computes the same value afresh.
_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
# Out of place these take the same arguments and mean the same; ``bernoulli_(p)`` would not.
_SAME_WITHOUT_UNDERSCORE = frozenset({
    "abs", "add", "addcdiv", "addcmul", "celu", "clamp", "clamp_max", "clamp_min", "div", "elu",
    "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lerp", "masked_fill",
    "mish", "mul", "neg", "pow", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "sqrt",
    "square", "sub", "tanh", "threshold",
})  # fmt: skip

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class _Call:
    """What a node calls."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def canonicalize_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Inline checkpoint bodies, make writes and scaled adds plain, merge slices, drop empty casts.

    Works in place on ``gm``. Idempotent.
    """
    del example_inputs
    modified = _inline_checkpoints(gm)
    modified |= _drop_casts(gm.graph)
    modified |= _split_scaled_adds(gm.graph)
    modified |= _functionalize(gm.graph)
    modified |= merge_equal_slices(gm.graph)
    return PassResult(gm, modified)


def _inline_checkpoints(gm: GraphModule) -> bool:
    """Replace each ``tag_activation_checkpoint`` call by its body, nested ones included."""
    inlined = 0
    while True:
        calls = [
            node
            for node in gm.graph.nodes
            if node.target is _CHECKPOINT and _is_plain_checkpoint(gm, node)
        ]
        if not calls:
            return inlined > 0
        for call in calls:
            _inline_checkpoint(gm, call, inlined)
            inlined += 1


def _is_plain_checkpoint(gm: GraphModule, call: Node) -> bool:
    getter = call.args[0]
    if not isinstance(getter, Node) or getter.op != "get_attr":
        return False
    # A selective policy decides operation by operation what is saved: our tags would override it.
    return "_checkpoint_context_fn" not in getattr(gm, str(getter.target)).meta


def _inline_checkpoint(gm: GraphModule, call: Node, number: int) -> None:
    getter = call.args[0]
    assert isinstance(getter, Node)
    body = getattr(gm, str(getter.target))
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(inputs, call.args[1:], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                name = _adopt(gm, body, str(node.target))
                values[node] = gm.graph.get_attr(name)
            elif node.op not in ("placeholder", "output"):
                copy = gm.graph.node_copy(node, lambda n: values[n])
                copy.meta = dict(node.meta)
                # AOTAutograd's partitioner reads these two; the number keeps bodies apart.
                copy.meta.setdefault(RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)
                copy.meta.setdefault(REGION, number)
                values[node] = copy
    outputs = torch.fx.node.map_arg(body.graph.output_node().args[0], lambda n: values[n])
    if not isinstance(outputs, tuple | list):
        outputs = (outputs,)
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[user.args[1]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not getter.users:
        gm.graph.erase_node(getter)


def _adopt(gm: GraphModule, body: GraphModule, name: str) -> str:
    """Make attribute ``name`` of a checkpoint body (a nested body) one of the graph itself."""
    value = getattr(body, name)
    if getattr(gm, name, None) is value:
        return name
    fresh, k = name, 0
    while hasattr(gm, fresh):
        k += 1
        fresh = f"{name}_{k}"
    setattr(gm, fresh, value)
    return fresh


def _drop_casts(graph: Graph) -> bool:
    """Drop casts to the dtype that a tensor has, and the checks by which torch.export holds it so.

    Such a cast gives its very argument, so that whoever reads the one reads the other.
    """
    modified = False
    for node in list(graph.nodes):
        if raw_name(node) == "_assert_tensor_metadata":
            graph.erase_node(node)
        elif (source := _uncast(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        else:
            continue
        modified = True
    return modified


def _uncast(node: Node) -> Node | None:
    """What a cast without effect gives; None for any other node."""
    source, name = first_input(node), raw_name(node)
    if source is None or len(node.all_input_nodes) != 1 or node.kwargs:
        return None
    if name == "to" and len(node.args) == 2:
        wanted = node.args[1]
    elif node.op == "call_method" and len(node.args) == 1:
        wanted = _CASTS.get(name)
    else:
        return None
    is_same = isinstance(wanted, torch.dtype) and wanted == dtype_of(source)
    return source if is_same else None


def _split_scaled_adds(graph: Graph) -> bool:
    """``add(x, f, alpha=a)`` is ``x + a * f``; ``sub`` keeps its meaning and is left alone."""
    modified = False
    for node in list(graph.nodes):
        alpha = node.kwargs.get("alpha", 1)
        other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        if op_name(node) != "add" or alpha == 1 or not isinstance(other, Node):
            continue
        is_aten = isinstance(node.target, OpOverload)
        mul = torch.ops.aten.mul.Tensor if is_aten else operator.mul
        with graph.inserting_before(node):
            scaled = graph.call_function(mul, (other, alpha))
        values = {key: other.meta[key] for key in VALUE_KEYS if key in other.meta}
        scaled.meta = {**meta_of_part(node), **values}
        node.args = (*node.args[:1], *(scaled for _ in node.args[1:]))
        node.kwargs = {
            key: scaled if key == "other" else value
            for key, value in node.kwargs.items()
            if key != "alpha"
        }
        modified = True
    return modified


def _functionalize(graph: Graph) -> bool:
    """Replace in-place float operations whose effect only their own result shows."""
    writes = [node for node in graph.nodes if _out_of_place(node) is not None]
    if not writes:
        return False
    aliases = AliasIndex(graph)
    modified = False
    for write in writes:
        target = first_input(write)
        if target is None or aliases.observer(write) is not None:
            continue
        _replace_write(graph, write, target, aliases)
        modified = True
    return modified


def _replace_write(graph: Graph, write: Node, target: Node, aliases: AliasIndex) -> None:
    for user in list(target.users):
        if aliases.position[user] > aliases.position[write]:
            user.replace_input_with(target, write)
    call = _out_of_place(write)
    assert call is not None
    write.op, write.target, write.args, write.kwargs = call.op, call.target, call.args, call.kwargs
    kept, promoted = dtype_of(target), _promoted(write, target)
    if promoted == kept:
        return
    # ``x += f`` keeps the dtype of x, ``x + f`` promotes.
    with graph.inserting_after(write):
        cast = graph.call_method("to", (write, kept))
    cast.meta = dict(write.meta)
    write.meta = {
        key: value.to(promoted) if isinstance(value, torch.Tensor) else value
        for key, value in write.meta.items()
    }
    write.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    aliases.add_copy(cast, write)


def _promoted(node: Node, first: Node) -> torch.dtype | None:
    """The dtype that ``node`` has out of place: a tensor without axes does not promote others."""
    value, dtype = value_of(first), dtype_of(first)
    for arg in node.all_input_nodes:
        other = value_of(arg)
        if dtype is not None and isinstance(other, torch.Tensor):
            dtype = torch.promote_types(dtype, torch.result_type(value, other))
    return dtype


def _out_of_place(node: Node) -> _Call | None:
    """The call that computes afresh what ``node`` writes in place; None where we know none."""
    flag = inplace_flag(node)
    if flag is not None:
        args = tuple(False if i == flag else arg for i, arg in enumerate(node.args))
        kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        return _Call(node.op, node.target, args, kwargs)
    if not is_in_place(node):
        return None
    target: Any = None
    name = raw_name(node).removesuffix("_")
    if node.target in _OPERATORS:
        target = _OPERATORS[node.target]
    elif name not in _SAME_WITHOUT_UNDERSCORE:
        return None
    elif isinstance(node.target, OpOverload):
        target = getattr(getattr(torch.ops.aten, name), node.target._overloadname, None)
    elif node.op == "call_method":
        target = name
    else:
        target = getattr(torch, name, None) or getattr(F, name, None)
    return None if target is None else _Call(node.op, target, node.args, dict(node.kwargs))
