"""Which nodes of a graph share storage, who writes into it, and who could see a write.

y = x.view(...); x += f        # y sees the write: x + f is not the same program
"""

from collections import defaultdict

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mhc_compile.passes.opnames import first_input, is_in_place, op_name, raw_name

# Operations whose result may share storage with their first argument.
_VIEWS = frozenset({
    "H", "T", "_get_data_attr", "_reshape_alias", "_to_copy", "_unsafe_view", "adjoint", "alias",
    "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "bfloat16", "broadcast_tensors",
    "broadcast_to", "chunk", "conj", "contiguous", "cpu", "cuda", "data", "detach", "diagonal",
    "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "dsplit", "expand", "expand_as",
    "feature_dropout", "flatten", "float", "getitem", "half", "hsplit", "identity", "imag", "mH",
    "mT", "movedim", "moveaxis", "narrow", "numpy_T", "permute", "positive", "ravel", "real",
    "reshape", "reshape_as", "resolve_conj", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "tensor_split", "to", "transpose", "type", "type_as", "unbind", "unflatten",
    "unfold", "unsafe_chunk", "unsafe_split", "unsqueeze", "view", "view_as", "view_as_complex",
    "view_as_real", "vsplit",
})  # fmt: skip


def written_values(node: Node) -> tuple[Node, ...]:
    """The values ``node`` writes into: in place, by ``setitem`` or ``out=``, or by its schema."""
    written: list[Node] = []
    if raw_name(node) == "higher_order.triton_kernel_wrapper_mutation":
        return tuple(node.all_input_nodes)  # which of its arguments it writes, the graph hides
    if op_name(node) == "setitem" or is_in_place(node):
        first = node.args[0] if node.args else node.kwargs.get("input")
        map_arg(first, written.append)  # torch._foreach_add_ writes a list
    elif isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                map_arg(value, written.append)
        for argument in node.target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                map_arg(node.kwargs.get(argument.name), written.append)
    map_arg(node.kwargs.get("out"), written.append)
    return tuple(dict.fromkeys(written))


class AliasIndex:
    """Storage groups of one graph, by the node that owns the storage.

    Conservative: ``reshape``, ``to`` or ``dropout`` may copy, and count as a view all the same.
    Rebuild it after the graph changed.
    """

    def __init__(self, graph: Graph) -> None:
        self.position: dict[Node, int] = {}
        self._base: dict[Node, Node] = {}
        self.members: dict[Node, list[Node]] = defaultdict(list)
        self.writes: dict[Node, list[Node]] = defaultdict(list)
        for position, node in enumerate(graph.nodes):
            self.position[node] = position
            written = written_values(node)
            source = written[0] if written else first_input(node)
            shares = source is not None and (bool(written) or op_name(node) in _VIEWS)
            base = self._base[source] if shares and source is not None else node
            self._base[node] = base
            self.members[base].append(node)
            for owner in dict.fromkeys(self._base[value] for value in written):
                self.writes[owner].append(node)

    def base(self, node: Node) -> Node:
        """The node that made the storage ``node`` lies in."""
        return self._base[node]

    def is_written(self, node: Node) -> bool:
        """Whether any in-place operation of the graph writes into the storage of ``node``."""
        return bool(self.writes.get(self._base.get(node, node)))

    def observer(self, write: Node) -> Node | None:
        """Another name under which code after ``write`` sees what it wrote; None if there is none.

        The written node itself does not count: its later readers can read the result instead.
        """
        target = first_input(write)
        assert target is not None
        base = self._base[write]
        if base.op in ("placeholder", "get_attr"):
            return base
        own = {target, write}
        for member in self.members[base]:
            if member in own or (member in self.writes[base] and first_input(member) in own):
                own.add(member)
                continue
            if any(self.position[user] > self.position[write] for user in member.users):
                if self._reaches(member, write):
                    continue
                return member
        return None

    def add_copy(self, copy: Node, original: Node) -> None:
        """Take note of a node that was inserted right behind ``original`` and copies it."""
        self.position[copy] = self.position[original]
        self._base[copy] = copy
        self.members[copy].append(copy)

    def _reaches(self, member: Node, write: Node) -> bool:
        """Whether ``member`` is a view taken of the result of ``write``: it reads the new value."""
        node = member
        while self.position[node] > self.position[write]:
            source = first_input(node)
            if source is None:
                return False
            node = source
        return node is write
