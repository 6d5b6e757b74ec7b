"""One name for an operation, however the graph spells it.

Dynamo graphs hold Python functions, ``torch`` builtins, methods and modules; exported graphs hold
ATen overloads. Passes compare `op_name`, so that ``x + y``, ``torch.add``, ``x.add_`` and
``aten.add.Tensor`` are all ``"add"``.
"""

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


def is_in_place(node: Node) -> bool:
    """Whether the node writes its first argument: ``x += f``, ``relu(x, inplace=True)``."""
    name = raw_name(node)
    if name in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    if not name.endswith("_") or name.endswith("__"):
        return False
    # operator.and_ is named so because "and" is a keyword
    return getattr(node.target, "__module__", None) != "_operator"


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
