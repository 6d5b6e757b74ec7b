"""Where the axes of a value go: permutations, however they are spelt."""

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import rank

PERMUTATIONS = frozenset(
    {"H", "T", "adjoint", "mH", "mT", "movedim", "moveaxis", "numpy_T", "permute", "t", "transpose"}
)


def axis_order(node: Node) -> tuple[int, ...] | None:
    """For each axis of the result, the axis of the operand it comes from.

    None if ``node`` is no permutation, or one along axes that are no constants.
    """
    source = first_input(node)
    if op_name(node) not in PERMUTATIONS or node.all_input_nodes != [source] or source is None:
        return None
    # The operation itself reads its arguments best: the sizes of the probe tell its axes apart.
    probe = torch.empty(tuple(range(2, 2 + rank(source))), device="meta")
    args = map_arg(node.args, lambda _: probe)
    kwargs = map_arg(dict(node.kwargs), lambda _: probe)
    if node.op == "call_method":
        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return tuple(size - 2 for size in result.shape)
