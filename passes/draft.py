"""`Draft`: operations that may take the place of a node, kept apart until that is decided."""

from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile.passes.estimate import Device, node_seconds
from mhc_compile.passes.values import OPERAND_VALUES, meta_of_part, value_of


class Draft:
    """New operations on the operands of ``site``."""

    def __init__(self, site: Node) -> None:
        """Start with no operation."""
        self._site = site
        self._graph = Graph()
        self._source_of: dict[Node, Any] = {}
        self._input_of: dict[Node, Node] = {}
        for source in site.all_input_nodes:
            node = self._graph.placeholder(source.name)
            node.meta = dict(source.meta)
            self._source_of[node], self._input_of[source] = source, node

    def operands(self) -> list[Any]:
        """The arguments of the site, as `call` takes them."""
        return list(map_arg(self._site.args, self._input_of.__getitem__))

    def call(self, suffix: str, value: Any, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add an operation.

        Args:
            suffix: its name, behind that of the site.
            value: what it gives, with fake tensors.
            target: an operator.
            args: constants, `operands` and earlier operations.
            kwargs: likewise.
        """
        name = self._site.name + suffix
        node = self._graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = {**meta_of_part(self._site), "val": value}
        if OPERAND_VALUES in self._site.meta:
            node.meta[OPERAND_VALUES] = (map_arg(args, value_of), kwargs)
        return node

    def seconds(self, device: Device) -> list[float]:
        """What each operation takes, in order."""
        made = (node for node in self._graph.nodes if node.op == "call_function")
        return [node_seconds(node, device) for node in made]

    def place(self, *results: Node) -> tuple[Node, ...]:
        """Put the operations in front of the site; gives what has become of ``results``."""
        self._graph.output(results)
        with self._site.graph.inserting_before(self._site):
            made = self._site.graph.graph_copy(self._graph, self._source_of)
        assert isinstance(made, tuple)
        return made
