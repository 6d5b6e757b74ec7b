"""New nodes that move axes and pick rows: views of what the model has, so gradients stay exact."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.chain_coefficients import Refused
from mhc_compile.passes.chain_values import Atom, Dim
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims, dtype_of, meta_of_part
from mhc_compile.passes.vocabulary import CAST, LAYOUT


class Emitter:
    """Adds nodes in front of one node; they stand for that node and share its description."""

    def __init__(self, graph: Graph, anchor: Node, rule: str) -> None:
        self.graph = graph
        self.anchor = anchor
        self.rule = rule
        self.added: list[Node] = []

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        """A new call in front of the anchor."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node("call_function", target, args)
        return self._described(node)

    def method(self, name: str, *args: Any) -> Node:
        """A new call of a method in front of the anchor."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_method(name, args)
        return self._described(node)

    def cast(self, node: Node, have: torch.dtype | None, want: torch.dtype | None) -> Node:
        """``node`` of dtype ``have`` as ``want``."""
        return node if have == want else self.method("to", node, want)

    def drop(self) -> None:
        """Take everything that was added off again."""
        for node in reversed(self.added):
            self.graph.erase_node(node)

    def _described(self, node: Node) -> Node:
        node.meta = meta_of_part(self.anchor)
        node.meta["custom"] = {**self.anchor.meta.get("custom", {}), "mhc": self.rule}
        self.added.append(node)
        return node

    def relayout(self, node: Node, have: Sequence[Dim], want: Sequence[Dim]) -> Node:
        """``node`` with axes ``have`` brought to axes ``want``.

        Raises:
            Refused: an axis would have to be split.
        """
        order = relayout_order(have, want)
        if list(have) == list(want):
            return node
        empty = [axis for axis, dim in enumerate(have) if not dim]
        if empty:
            node = self.call(torch.squeeze, node, tuple(empty))
            left = [axis for axis in range(len(have)) if axis not in empty]
            order = [left.index(axis) for axis in order]
        if order != list(range(len(order))):
            node = self.call(torch.permute, node, tuple(order))
        for axis, dim in enumerate(want):
            parts = _parts(have, dim)
            if parts > 1:
                node = self.call(torch.flatten, node, axis, axis + parts - 1)
            if not parts:
                node = self.call(torch.unsqueeze, node, axis)
        return node

    def pick(self, node: Node, rows: list[int], count: int, square: int) -> Node:
        """Rows of a tensor of ``count`` rows, put together from slices.

        Args:
            node: the tensor.
            rows: which, in order.
            count: how many it has.
            square: n, if blocks of n * n rows may be there with their axes exchanged.
        """
        if rows == list(range(count)):
            return node
        pieces: list[Node] = []
        at = 0
        while at < len(rows):
            start = rows[at]
            if _is_swapped(rows[at:], square):
                size = square * square
                piece = self._rows(node, start, start + size, count)
                piece = self.call(torch.unflatten, piece, 0, (square, square))
                piece = self.call(torch.transpose, piece, 0, 1)
                pieces.append(self.call(torch.flatten, piece, 0, 1))
            else:
                size = _run(rows[at:], square)
                step = rows[at + 1] - start if size > 1 else 1
                pieces.append(self._rows(node, start, rows[at + size - 1] + 1, count, step))
            at += size
        return pieces[0] if len(pieces) == 1 else self.call(torch.cat, pieces)

    def _rows(self, node: Node, start: int, stop: int, count: int, step: int = 1) -> Node:
        if (start, stop, step) == (0, count, 1):
            return node
        return self.call(torch.ops.aten.slice.Tensor, node, 0, start, stop, step)


def _is_swapped(rows: list[int], n: int) -> bool:
    """Whether ``rows`` starts with n * n neighbours, rows and columns exchanged."""
    expected = [rows[0] + j * n + i for i in range(n) for j in range(n)]
    return n > 1 and rows[: n * n] == expected


def _run(rows: list[int], n: int) -> int:
    """How many of the first ``rows`` lie at one distance from each other."""
    if len(rows) == 1 or rows[1] <= rows[0] or _is_swapped(rows[1:], n):
        return 1
    size, step = 2, rows[1] - rows[0]
    while size < len(rows) and rows[size] - rows[size - 1] == step:
        if _is_swapped(rows[size:], n):
            break
        size += 1
    return size


def relayout_order(have: Sequence[Dim], want: Sequence[Dim]) -> list[int]:
    """For each non-empty axis of ``want``, piece by piece, the axis of ``have`` that it is.

    Raises:
        Refused: they do not hold the same axes.
    """
    order: list[int] = []
    for dim in want:
        rest: Dim = tuple(dim)
        while rest:
            axis = next(
                (
                    i
                    for i, own in enumerate(have)
                    if own and i not in order and own == rest[: len(own)]
                ),
                None,
            )
            if axis is None:
                raise Refused("its axes are folded in a way that no view undoes")
            order.append(axis)
            rest = rest[len(have[axis]) :]
    if len(order) != sum(bool(dim) for dim in have):
        raise Refused("its axes are folded in a way that no view undoes")
    return order


def _parts(have: Sequence[Dim], dim: Dim) -> int:
    """How many axes of ``have`` make up ``dim``."""
    parts, rest = 0, dim
    while rest:
        own = next(own for own in have if own and own == rest[: len(own)])
        rest = rest[len(own) :]
        parts += 1
    return parts


def canonical(axes: Sequence[Dim], streams: int, channels: int) -> tuple[Dim, ...]:
    """Axes of the same state as ``[tokens..., n, C]``, a token axis for each."""
    tokens: list[Dim] = []
    for dim in axes:
        if not dim:
            tokens.append(())
        tokens += [(atom,) for atom in dim if atom.kind == "token"]
    return (*tokens, (Atom("small", streams),), (Atom("channel", channels),))


def uncast(node: Node) -> Node:
    """``node`` before casts that only widened it."""
    source = first_input(node)
    while op_name(node) in CAST and source is not None:
        narrow, wide = dtype_of(source), dtype_of(node)
        if narrow is None or wide is None or torch.promote_types(narrow, wide) != wide:
            return node
        node, source = source, first_input(source)
    return node


def unviewed(node: Node, sizes: Sequence[Any]) -> Node:
    """A source of ``node`` that has the shape ``sizes`` and differs by axes of size 1 alone."""
    found, source = node, uncast(node)
    while True:
        if list(dims(source)) == list(sizes):
            found = source
        above = first_input(source) if op_name(source) in LAYOUT else None
        if above is None or _solid(above) != _solid(source):
            return found
        source = uncast(above)


def _solid(node: Node) -> list[Any]:
    return [size for size in dims(node) if size != 1]
