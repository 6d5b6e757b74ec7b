"""Facts about the value that a node computes, read from the graph's metadata alone.

Dynamo keeps a fake value in ``meta["example_value"]``, torch.export and AOTAutograd in
``meta["val"]``. Sizes may be symbolic: comparing two symbolic sizes with ``==`` would add a guard
to the compilation, so `dims` and `numel` hand out their expressions, which compare for free.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

RECOMPUTE, REGION = "recompute", "ac_graph_id"
"""Metadata of ``torch.utils.checkpoint``: what the backward does with a value, and the number of
the region that is made again as a whole. AOTAutograd's partitioner obeys them."""
OPERAND_VALUES = "eager_input_vals"
"""Metadata in which Inductor looks up the strides that arguments of a custom op have to have:
(positional, named), with the values of nodes in their place."""
VALUE_KEYS = ("example_value", "val", "tensor_meta", OPERAND_VALUES)
"""Metadata that describes a node's value or its operands', and so does not fit another node."""

# "  File "model.py", line 12, in forward": one frame of a node's stack trace.
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# The forward that converted modules get runs around the user's own, and is not the user's.
_OURS = "mhc_compile/guard.py"
# What a Dynamo source passes through when the value is kept by a module.
_STATE = ("._parameters[", "._buffers[", "._modules[")


def value_of(node: Node) -> Any:
    """The node's example value; None where the capture recorded none."""
    for key in ("example_value", "val"):
        if key in node.meta:
            return node.meta[key]
    return _attribute(node) if node.op == "get_attr" else None


def is_tensor(node: Node) -> bool:
    """Whether the node computes one tensor."""
    return isinstance(value_of(node), torch.Tensor)


def is_float_tensor(node: Node) -> bool:
    """Whether the node computes one tensor of floats (or complex numbers)."""
    return _is_float(value_of(node))


def carries_float(node: Node) -> bool:
    """Whether floats flow through the node: a float tensor, or a tuple that holds one."""
    return any(_is_float(leaf) for leaf in _leaves(value_of(node)))


def dims(node: Node) -> tuple[int | Any, ...]:
    """The tensor's sizes: ints, and expressions for symbolic sizes; () if it is no tensor."""
    value = value_of(node)
    return tuple(map(_size, value.shape)) if isinstance(value, torch.Tensor) else ()


def numel(node: Node) -> int | Any:
    """The product of `dims`."""
    return math.prod(dims(node))


def rank(node: Node) -> int:
    """The number of the tensor's dimensions; 0 if it is no tensor."""
    return len(dims(node))


def dtype_of(node: Node) -> torch.dtype | None:
    """The tensor's dtype; None if the node computes no tensor."""
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_state(node: Node) -> bool:
    """Whether the node is a tensor that a module keeps: parameter, buffer or plain attribute.

    Exported graphs read them with ``get_attr``. Dynamo makes them placeholders: told from the
    inputs by their type, or by where Dynamo found the value.
    """
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if isinstance(value_of(node), torch.nn.Parameter):
        return True
    graph_arg = node.meta.get("grapharg")
    source = getattr(node, "_dynamo_source", None) or getattr(graph_arg, "source", None)
    if source is None:
        return False
    return "NN_MODULE" in source.guard_source.name or any(part in source.name for part in _STATE)


def source_line(node: Node) -> str:
    """``file.py:123`` of the innermost user frame that made the node; "" if none was recorded."""
    path, line = source_frame(node)
    return f"{path.rsplit('/', 1)[-1]}:{line}" if path else ""


def source_frame(node: Node) -> tuple[str, int]:
    """The whole path and the line of the same frame; ("", 0) if none was recorded."""
    for path, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        path = path.replace(chr(92), "/")
        if not path.endswith(_OURS):
            return path, int(line)
    return "", 0


def describe(node: Node) -> str:
    """The node for a person: its name, and its line where one is known."""
    line = source_line(node)
    return f"'{node.name}' ({line})" if line else f"'{node.name}'"


def meta_of_part(node: Node) -> dict[str, Any]:
    """Metadata for a new node that stands for a part of ``node``: all but what tells its value."""
    return {key: value for key, value in node.meta.items() if key not in VALUE_KEYS}


def _attribute(node: Node) -> Any:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _size(size: Any) -> int | Any:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression  # a size that turned out fixed
