"""Bring a captured graph to one form, before anything is looked for in it.

    checkpoint(body, x)    ->  the operations of body, tagged for recomputation
    x += f;  relu_(x)      ->  x1 = x + f;  x2 = relu(x1)      where nobody else sees the write
    torch.add(x, f, alpha) ->  x + alpha * f

The result computes what the graph computed. A write that somebody else could see is left as it is;
`find_residuals` and `plan_trunks` then refuse the sites it touches.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.aliases import AliasIndex
from mhc_compile.passes.opnames import is_in_place, op_name, raw_name

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

# In-place forms we know, and the function that computes the same value afresh.
_FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
# Out of place these take the same arguments and mean the same; ``bernoulli_(p)`` would not.
_SAME_WITHOUT_UNDERSCORE = frozenset({
    "add", "celu", "clamp", "div", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "mish", "mul",
    "neg", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "sub", "tanh", "threshold",
})  # fmt: skip


def canonicalize_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Inline checkpoint bodies and make in-place writes and scaled adds plain.

    Works in place on ``gm``. Idempotent.
    """
    del example_inputs
    modified = _inline_checkpoints(gm)
    modified |= _split_scaled_adds(gm.graph)
    modified |= _functionalize(gm.graph)
    return PassResult(gm, modified)


def _inline_checkpoints(gm: GraphModule) -> bool:
    """Replace each ``tag_activation_checkpoint`` call by its body, nested ones included."""
    inlined = 0
    while True:
        calls = [
            node
            for node in gm.graph.nodes
            if node.target is _CHECKPOINT and _is_plain_checkpoint(node)
        ]
        if not calls:
            return inlined > 0
        for call in calls:
            _inline_checkpoint(gm, call, inlined)
            inlined += 1


def _is_plain_checkpoint(call: Node) -> bool:
    # A selective policy decides operation by operation what is saved: our tags would override it.
    return isinstance(call.args[0], Node) and "_checkpoint_context_fn" not in call.meta


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
                copy.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
                copy.meta.setdefault("ac_graph_id", number)
                copy.meta["custom"] = {"mhc_body": number, **node.meta.get("custom", {})}
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


def _split_scaled_adds(graph: Graph) -> bool:
    """``add(x, f, alpha=a)`` is ``x + a * f``; ``sub`` keeps its meaning and is left alone."""
    modified = False
    for node in list(graph.nodes):
        alpha = node.kwargs.get("alpha", 1)
        if op_name(node) != "add" or alpha == 1 or len(node.args) < 2:
            continue
        mul = (
            torch.ops.aten.mul.Tensor
            if isinstance(node.target, torch._ops.OpOverload)
            else operator.mul
        )
        with graph.inserting_before(node):
            scaled = graph.call_function(mul, (node.args[1], alpha))
        scaled.meta = _plain_meta(node)
        example = node.args[1]
        if isinstance(example, Node):
            for key in ("example_value", "val", "tensor_meta"):
                if key in example.meta:
                    scaled.meta[key] = example.meta[key]
        node.update_arg(1, scaled)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "alpha"}
        modified = True
    return modified


def _plain_meta(node: Node) -> dict[str, Any]:
    return {
        key: value
        for key, value in node.meta.items()
        if key not in ("example_value", "val", "tensor_meta")
    }


def _functionalize(graph: Graph) -> bool:
    """Replace in-place float operations whose effect only their own result shows."""
    writes = [
        node for node in graph.nodes if is_in_place(node) and _functional_form(node) is not None
    ]
    if not writes:
        return False
    aliases = AliasIndex(graph)
    modified = False
    for write in writes:
        target = write.args[0]
        if not isinstance(target, Node) or aliases.observer(write) is not None:
            continue
        _replace_write(graph, write, target, aliases)
        modified = True
    return modified


def _replace_write(graph: Graph, write: Node, target: Node, aliases: AliasIndex) -> None:
    for user in list(target.users):
        if aliases.position.get(user, -1) > aliases.position[write]:
            user.replace_input_with(target, write)
    form = _functional_form(write)
    assert form is not None
    kwargs = {k: v for k, v in write.kwargs.items() if k != "inplace"}
    if "inplace" in write.kwargs:
        kwargs["inplace"] = False
    write.op, write.target, write.kwargs = form[0], form[1], kwargs
    # `x += f` keeps the dtype of x, `x + f` promotes.
    kept, other = _dtype(target), _dtype(write.args[1]) if len(write.args) > 1 else None
    if kept is not None and other is not None and torch.promote_types(kept, other) != kept:
        with graph.inserting_after(write):
            cast = graph.call_method("to", (write, kept))
        cast.meta = dict(write.meta)
        write.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    write.meta["custom"] = {**write.meta.get("custom", {}), "mhc_in_place": True}


def _functional_form(node: Node) -> tuple[str, Any] | None:
    """(node.op, target) of the out-of-place twin; None where we know none."""
    if node.kwargs.get("inplace") is True:
        return node.op, node.target
    name = op_name(node)
    if name not in _SAME_WITHOUT_UNDERSCORE:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, raw_name(node).removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        return None if overload is None else ("call_function", overload)
    if name in _FUNCTIONAL and len(node.args) == 2 and not node.kwargs:
        return "call_function", _FUNCTIONAL[name]
    if node.op == "call_method" and hasattr(torch.Tensor, name):
        return "call_method", name
    return None


def _dtype(value: Any) -> torch.dtype | None:
    if not isinstance(value, Node):
        return None
    example = value.meta.get("example_value", value.meta.get("val"))
    return example.dtype if isinstance(example, torch.Tensor) else None
