"""Hand-made FX graphs whose nodes carry real values, and the Dynamo graphs of small modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


class Builder:
    """Adds nodes to a graph and computes each on the spot, so that ``example_value`` is right."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._count = 0

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        return self._placeholder(torch.zeros(shape, dtype=dtype))

    def parameter(self, *shape: int) -> Node:
        return self._placeholder(nn.Parameter(torch.ones(shape), requires_grad=False))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(function, args, kwargs)
        node.meta["example_value"] = function(*_values(args), **_values(kwargs))
        return node

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_method(name, args, kwargs)
        first, *rest = _values(args)
        node.meta["example_value"] = getattr(first, name)(*rest, **_values(kwargs))
        return node

    def linear(self, x: Node) -> Node:
        width = x.meta["example_value"].shape[-1]
        return self.call(torch.nn.functional.linear, x, self.parameter(width, width))

    def output(self, *nodes: Node) -> Graph:
        self.graph.output(nodes)
        self.graph.lint()
        return self.graph

    def _placeholder(self, value: torch.Tensor) -> Node:
        self._count += 1
        node = self.graph.placeholder(f"in{self._count}")
        node.meta["example_value"] = value
        return node


def capture(module: nn.Module, *args: Any) -> Graph:
    """The single Dynamo graph of ``module``."""
    (graph,) = captures(module, *args)
    return graph


def captures(module: nn.Module, *args: Any, **kwargs: Any) -> list[Graph]:
    """Copies of the Dynamo graphs of one call, whose metadata outlives the compilation."""
    graphs: list[Graph] = []

    def collect(gm: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        copy = Graph()
        mapping: dict[Node, Node] = {}
        copy.output(copy.graph_copy(gm.graph, mapping))
        for old, new in mapping.items():
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
        graphs.append(copy)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=collect)(*args, **kwargs)
    return graphs


def _values(args: Any) -> Any:
    return map_arg(args, lambda node: node.meta["example_value"])
