"""Which nodes of a graph share storage, and who could see an in-place write.

y = x.view(...); x += f        # y sees the write: x + f is not the same program
"""

from collections import defaultdict

from torch.fx import Graph, Node

from mhc_compile.passes.opnames import is_in_place, op_name

# Operations whose result may share storage with their first argument.
_VIEWS = frozenset({
    "alias", "as_strided", "broadcast_to", "chunk", "contiguous", "detach", "diagonal", "expand",
    "expand_as",
    "flatten", "float", "double", "half", "bfloat16", "getattr", "getitem", "hsplit", "identity",
    "imag",
    "movedim", "moveaxis", "narrow", "numpy_T", "permute", "ravel", "real", "reshape", "reshape_as",
    "select",
    "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "tensor_split", "to",
    "transpose", "type",
    "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "unsafe_chunk", "unsafe_split", "view",
    "view_as",
    "view_as_complex", "view_as_real", "vsplit", "dsplit", "dropout", "_to_copy",
})  # fmt: skip


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
            source = node.args[0] if node.args else None
            writes = is_in_place(node) or op_name(node) == "setitem"
            shares = isinstance(source, Node) and (writes or op_name(node) in _VIEWS)
            base = self._base[source] if shares and isinstance(source, Node) else node
            self._base[node] = base
            self.members[base].append(node)
            if writes:
                self.writes[base].append(node)

    def base(self, node: Node) -> Node:
        """The node that made the storage ``node`` lies in."""
        return self._base[node]

    def is_written(self, node: Node) -> bool:
        """Whether any in-place operation of the graph writes into the storage of ``node``."""
        return bool(self.writes.get(self._base[node]))

    def observer(self, write: Node) -> Node | None:
        """Another name under which code after ``write`` sees what it wrote; None if there is none.

        The written node itself does not count: its later readers can read the result instead.
        """
        target = write.args[0]
        assert isinstance(target, Node)
        base = self._base[write]
        if base.op in ("placeholder", "get_attr"):
            return base
        own = {target, write}
        for member in self.members[base]:
            if member in own or (member in self.writes[base] and member.args[0] in own):
                own.add(member)
                continue
            if any(self.position[user] > self.position[write] for user in member.users):
                if self._reaches(member, write):
                    continue
                return member
        return None

    def _reaches(self, member: Node, write: Node) -> bool:
        """Whether ``member`` is a view taken of the result of ``write``: it reads the new value."""
        node = member
        while self.position[node] > self.position[write]:
            source = node.args[0] if node.args else None
            if not isinstance(source, Node):
                return False
            node = source
        return node is write
