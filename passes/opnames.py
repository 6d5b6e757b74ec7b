"""One name for an operation, however the graph spells it.

Dynamo graphs hold Python functions, ``torch`` builtins, methods and modules; exported graphs hold
ATen overloads. Passes compare `op_name`, so that ``x + y``, ``torch.add``, ``x.add_`` and
``aten.add.Tensor`` are all ``"add"``.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Node

# F.max_pool2d and friends are closures of boolean_dispatch: their __name__ is "fn".
_BY_OBJECT = {
    getattr(F, f"{kind}_pool{d}d"): f"{kind}_pool{d}d"
    for kind in ("max", "adaptive_max", "fractional_max")
    for d in (1, 2, 3)
    if hasattr(F, f"{kind}_pool{d}d")
}

# Python's and torch's second names for one operation.
_ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "imatmul": "matmul",
    "truediv": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "pow_": "pow",
    "ipow": "pow",
    "invert": "bitwise_not",
}
_IN_PLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "imatmul", "ipow"})


def raw_name(node: Node) -> str:
    """The operation's own name: ``iadd``, ``add_``, ``linear``; "" for a node without a call."""
    if node.op == "call_function":
        # x.real, x.mT
        return str(node.args[1]) if node.target is getattr else _function_name(node.target)
    if node.op == "call_method":
        return str(node.target)
    return "call_module" if node.op == "call_module" else ""


def op_name(node: Node) -> str:
    """The operation without its spelling: ``add`` for ``iadd``, ``add_`` and ``aten.add``."""
    return _plain(raw_name(node))


def is_mhc(node: Node) -> bool:
    """Whether the node is one of our operators."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "mhc"


def is_in_place(node: Node) -> bool:
    """Whether the node writes its first argument: ``x += f``, ``relu(x, inplace=True)``."""
    name = raw_name(node)
    if name in _IN_PLACE_OPERATORS or inplace_flag(node) is not None:
        return True
    if not name.endswith("_") or name.endswith("__"):
        return False
    # operator.and_ is named so because "and" is a keyword
    return getattr(node.target, "__module__", None) != "_operator"


def inplace_flag(node: Node) -> int | str | None:
    """Where the node is told to write its first argument: a position, or ``"inplace"``; else None.

    >>> from torch.fx import Graph
    >>> graph = Graph()
    >>> x = graph.placeholder("x")
    >>> inplace_flag(graph.call_function(F.relu, (x, True)))
    1
    """
    if node.kwargs.get("inplace") is True:
        return "inplace"
    if node.op != "call_function" or not any(arg is True for arg in node.args):
        return None
    position = _inplace_position(node.target)
    given = position is not None and position < len(node.args) and node.args[position] is True
    return position if given else None


def first_input(node: Node) -> Node | None:
    """The node's first argument, also where it is spelt ``input=x``; None if it is no node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Node) else None


def two_inputs(node: Node) -> tuple[Node, Node] | None:
    """The last two tensors of a product, spelt by place or by name; None if it has fewer.

    ``matmul(a, b)``, ``bmm(a, mat2=b)``, ``baddbmm(c, batch1=a, batch2=b)`` all give (a, b).
    """
    given = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Node)]
    return (given[-2], given[-1]) if len(given) > 1 else None


@lru_cache(maxsize=4096)
def _inplace_position(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


@lru_cache(maxsize=4096)
def _function_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return _bare(target._schema.name)
    if isinstance(target, OpOverloadPacket):
        return _bare(target._qualified_op_name)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    known = _BY_OBJECT.get(target)
    return known if known is not None else str(getattr(target, "__name__", target))


def _bare(qualified: str) -> str:
    namespace, _, name = qualified.partition("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)
