"""One node for equal slices of one value.

    y = x[:, 1:] + f(x[:, 1:])    ->    s = x[:, 1:];  y = s + f(s)

What a model reads twice is the same value, and a residual around a part of a tensor shows as one
only if skip and branch start from the same node.
"""

from typing import Any

from torch.fx import Graph, Node

from mhc_compile.passes.aliases import AliasIndex
from mhc_compile.passes.opnames import raw_name
from mhc_compile.passes.walks import is_slice


def merge_equal_slices(graph: Graph) -> bool:
    """Let the readers of a slice read an earlier one that takes the same.

    Slices of what the graph writes into stay: between the two, the value may change.

    Returns:
        Whether anything changed.
    """
    aliases: AliasIndex | None = None
    first: dict[Any, Node] = {}
    modified = False
    for node in list(graph.nodes):
        if not is_slice(node):
            continue
        aliases = aliases or AliasIndex(graph)
        earlier = first.setdefault((raw_name(node), *map(_key, node.args)), node)
        if earlier is not node and not node.kwargs and not aliases.is_written(node):
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            modified = True
    return modified


def _key(arg: Any) -> Any:
    """``arg`` as something that can be looked up: slices and lists cannot."""
    if isinstance(arg, slice):
        return ("slice", arg.start, arg.stop, arg.step)
    return tuple(map(_key, arg)) if isinstance(arg, tuple | list) else arg
