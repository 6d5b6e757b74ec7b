"""Maximal sum trees: ``x + attn + mlp`` is one sum of three leaves, however it is bracketed.

An inner add belongs to the tree of its only reader if it has the shape of the root.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from mhc_compile.passes.opnames import is_in_place, op_name
from mhc_compile.passes.values import dims, is_float_tensor


@dataclass(frozen=True, slots=True)
class SumTree:
    """A sum of float tensors and how it is bracketed."""

    root: Node
    """The last add."""
    leaves: tuple[Node, ...]
    """What is added, in reading order; a value added twice is there twice."""
    inner: tuple[Node, ...]
    """The other adds, in reading order."""

    @property
    def in_place(self) -> bool:
        """Whether one of the adds writes into an operand."""
        return any(is_in_place(node) for node in (self.root, *self.inner))


def operands(node: Node) -> tuple[Node, Node] | None:
    """The two float tensors that ``node`` adds; None if it is no such sum."""
    if op_name(node) != "add" or not is_float_tensor(node):
        return None
    left = node.args[0] if node.args else node.kwargs.get("input")
    right = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    return (left, right) if is_float_tensor(left) and is_float_tensor(right) else None


def sum_trees(nodes: Iterable[Node]) -> tuple[SumTree, ...]:
    """The maximal sum trees among ``nodes`` (which are in graph order), by position of the root."""
    trees: list[SumTree] = []
    inner: set[Node] = set()
    for node in reversed(tuple(nodes)):
        if node not in inner and operands(node) is not None:
            tree = _grow(node)
            inner.update(tree.inner)
            trees.append(tree)
    return tuple(reversed(trees))


def _grow(root: Node) -> SumTree:
    shape = dims(root)
    leaves: list[Node] = []
    inner: list[Node] = []
    stack = list(reversed(operands(root) or ()))
    while stack:
        node = stack.pop()
        below = operands(node) if len(node.users) == 1 and dims(node) == shape else None
        if below is None:
            leaves.append(node)
        else:
            inner.append(node)
            stack.extend(reversed(below))
    return SumTree(root, tuple(leaves), tuple(inner))
