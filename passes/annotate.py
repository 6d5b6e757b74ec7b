"""Give new nodes the example values that captured ones have, so that a dump shows their shapes."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from mhc_compile.passes.values import value_of


def annotate_values(gm: GraphModule) -> None:
    """Compute the missing example values of ``gm`` on fake tensors; nothing else of it changes."""
    mode = next(
        (v.fake_mode for n in gm.graph.nodes if hasattr(v := value_of(n), "fake_mode")), None
    )
    if mode is None:
        return
    key = "val" if any("val" in node.meta for node in gm.graph.nodes) else "example_value"
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and value_of(node) is None:
            operands = [value_of(arg) for arg in node.all_input_nodes]
            if any(operand is None for operand in operands):
                continue
            with mode:
                node.meta[key] = _compute(node, mode)


def _compute(node: Node, mode: FakeTensorMode) -> Any:
    def fake(arg: Node) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: _into(mode, tensor), value_of(arg))

    args, kwargs = map_arg(node.args, fake), map_arg(dict(node.kwargs), fake)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _into(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a fake of ``mode``: Dynamo changes its mode between capture and backend."""
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
