"""``phi``, ``bias`` and ``alpha`` of an op, put together from the model's own parameters.

phi[j C + c, k] = product of the vectors that logit k multiplies stream j with
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby, product
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.chain_coefficients import Logit, Refused
from mhc_compile.passes.chain_layout import Emitter, uncast
from mhc_compile.passes.chain_scope import Scope
from mhc_compile.passes.chain_terms import Term
from mhc_compile.passes.chain_values import Dim
from mhc_compile.passes.opnames import is_in_place
from mhc_compile.passes.values import dims, rank

Column = Sequence[tuple[Term, ...]]


class Parameters:
    """Builds the parameters of one site in front of its pre."""

    def __init__(
        self, emitter: Emitter, scope: Scope, streams: int, outputs: Sequence[Node]
    ) -> None:
        """Prepare.

        Args:
            emitter: adds the nodes.
            scope: of the site's state.
            streams: n.
            outputs: nodes that parameters must not depend on.
        """
        self.emitter, self.scope, self.streams = emitter, scope, streams
        self.outputs = outputs
        self.made: dict[tuple[Any, ...], Node] = {}

    def phi(self, groups: Sequence[Sequence[Logit]]) -> Node:
        """``[n C, m]``, or ``[C, n + 2]`` where each stream is projected by itself."""
        columns = _per_stream(groups, self.streams)
        if columns is None:
            columns = [logit.column for group in groups for logit in group]
        gains = _gains(columns)
        pieces = [
            self._product([n for n in nodes if n not in gains], list(block))
            for nodes, block in groupby(columns, key=_nodes)
        ]
        made = self._cat(pieces)
        for gain in gains:
            made = self.emitter.call(torch.mul, made, self._product([gain], columns[:1]))
        return self._transpose(made)

    def bias(self, groups: Sequence[Sequence[Logit]], phi: Node) -> Node:
        """``[m]``."""
        logits = [logit for group in groups for logit in group]
        if all(logit.bias is None for logit in logits):
            return self.emitter.method("new_zeros", phi, (len(logits),))
        if any(logit.bias is None for logit in logits):
            raise Refused("some of its coefficients have a bias and some have none")
        pieces = []
        for (node, factor), block in groupby(logits, key=_bias_source):
            count = math.prod(dims(node))
            rows = [logit.bias.args[1] for logit in block if logit.bias is not None]
            flat = self._flat(self._ready(node))
            piece = self.emitter.pick(flat, rows, count, self.streams)
            pieces.append(self._scaled(piece, factor))
        return self._cat(pieces)

    def alpha(self, groups: Sequence[Sequence[Logit]], phi: Node) -> Node:
        """``[3]``, or ``[1]`` of a head."""
        scales = [group[0].scale for group in groups if group]
        scales += scales[-1:] * (len(groups) - len(scales))
        if all(factor == 1.0 and len(leaves) == 1 for factor, leaves in scales):
            leaves = [leaf for _, (leaf,) in scales]
            node = leaves[0].args[0]
            wanted = [(node, i) for i in range(math.prod(dims(node)))]
            if [leaf.args[:2] for leaf in leaves] == wanted:
                return self._flat(self._ready(node))
        numbers = [self._number(factor, leaves, phi) for factor, leaves in scales]
        return self.emitter.call(torch.stack, numbers)

    def _number(self, factor: float, leaves: Sequence[Term], phi: Node) -> Node:
        """A scale as a tensor without axes."""
        made: Node | None = None
        for leaf in leaves:
            node = self._ready(leaf.args[0])
            if rank(node):
                node = self.emitter.call(torch.select, self._flat(node), 0, leaf.args[1])
            made = node if made is None else self.emitter.call(torch.mul, made, node)
        if made is None:
            return self.emitter.method("new_full", phi, (), factor)
        return self._scaled(made, factor)

    def _product(self, nodes: Sequence[Node], columns: Sequence[Column]) -> Node:
        """``[columns, streams * C]`` for columns made from the same tensors."""
        made: Node | None = None
        for node in nodes:
            part = self._gathered(node, [[_index(p, node) for p in column] for column in columns])
            made = part if made is None else self.emitter.call(torch.mul, made, part)
        assert made is not None
        return made

    def _gathered(self, node: Node, rows: Sequence[Sequence[int]]) -> Node:
        """``[len(rows), streams * C]``: the vectors at ``rows``, those of a row side by side."""
        source, sizes, places = self._channels_last(node)
        rows = [[places[index] for index in row] for row in rows]
        count, side, width = len(places), len(rows[0]), self._width()
        if all(row[0] % side == 0 and row == [row[0] + i for i in range(side)] for row in rows):
            table = self._reshaped(source, sizes, (count // side, side * width))
            picked = [row[0] // side for row in rows]
            return self.emitter.pick(table, picked, count // side, self.streams)
        table = self._reshaped(source, sizes, (count, width))
        flat = [index for row in rows for index in row]
        picked_rows = self.emitter.pick(table, flat, count, self.streams)
        return self._reshaped(picked_rows, (len(flat), width), (len(rows), side * width))

    def _channels_last(self, node: Node) -> tuple[Node, tuple[int, ...], list[int]]:
        """The tensor with its channels last, its sizes, and where each of its vectors went."""
        axes, sizes = self.scope.adopted[node], dims(node)
        source = self._ready(node)
        at = next(i for i, dim in enumerate(axes) if any(a.kind == "channel" for a in dim))
        if axes[at][-1].kind != "channel":  # streams vary faster: an axis for each
            parts = axes[at]
            axes = (*axes[:at], *((atom,) for atom in parts), *axes[at + 1 :])
            split = (*sizes[:at], *(atom.size for atom in parts), *sizes[at + 1 :])
            source, sizes = self._reshaped(source, sizes, split), split
            at += next(i for i, atom in enumerate(parts) if atom.kind == "channel")
        order = [*(i for i in range(len(axes)) if i != at), at]
        if order != sorted(order):
            source = (
                self._transpose(source)
                if len(order) == 2
                else self.emitter.call(torch.permute, source, tuple(order))
            )
        return source, tuple(sizes[i] for i in order), _places(axes, order)

    def _width(self) -> int:
        assert self.scope.channels is not None
        return self.scope.channels

    def _reshaped(self, node: Node, have: Sequence[int], want: Sequence[int]) -> Node:
        if tuple(have) == tuple(want):
            return node
        return self._once(torch.reshape, node, tuple(want))

    def _once(self, target: Callable[..., Any], node: Node, *args: Any) -> Node:
        """A call that may be needed several times."""
        key = (target, node, *args)
        if key not in self.made:
            self.made[key] = self.emitter.call(target, node, *args)
        return self.made[key]

    def _transpose(self, node: Node) -> Node:
        if node in self.emitter.added and node.target is torch.t:
            source = node.args[0]
            assert isinstance(source, Node)
            return source
        return self._once(torch.t, node)

    def _cat(self, pieces: list[Node]) -> Node:
        return pieces[0] if len(pieces) == 1 else self.emitter.call(torch.cat, pieces)

    def _flat(self, node: Node) -> Node:
        return node if rank(node) == 1 else self._once(torch.flatten, node)

    def _scaled(self, node: Node, factor: float) -> Node:
        return node if factor == 1.0 else self.emitter.call(torch.mul, node, factor)

    def _ready(self, node: Node) -> Node:
        """A parameter, moved in front of the site if it is rearranged further below."""
        node = uncast(node)
        _hoist(self.emitter.graph, node, self.emitter.anchor, self.outputs)
        return node


def _nodes(column: Column) -> tuple[Node, ...]:
    """The tensors a column is made from, in a fixed order."""
    nodes = {tuple(leaf.args[0] for leaf in part) for part in column}
    if len(nodes) != 1:
        raise Refused("its projection multiplies each stream with another tensor")
    return tuple(sorted(dict.fromkeys(nodes.pop()), key=lambda node: node.name))


def _index(part: tuple[Term, ...], node: Node) -> int:
    found = [leaf.args[1] for leaf in part if leaf.args[0] is node]
    if len(found) != 1:
        raise Refused("its projection multiplies with a tensor twice")
    index = found[0]
    assert isinstance(index, int)
    return index


def _bias_source(logit: Logit) -> tuple[Node, float]:
    assert logit.bias is not None
    return logit.bias.args[0], logit.bias_factor


def _per_stream(groups: Sequence[Sequence[Logit]], streams: int) -> list[Column] | None:
    """The n + 2 columns of a projection that all streams share; None if it takes all streams."""
    if groups[0][0].stream is None:
        return None
    columns: list[Column] = []
    for start in range(0, sum(map(len, groups)), streams):
        block = [logit for group in groups for logit in group][start : start + streams]
        if [logit.stream for logit in block] != list(range(streams)):
            raise Refused("its coefficients are projected from other streams than they weigh")
        if len({logit.column for logit in block}) != 1:
            raise Refused("each stream is projected by weights of its own")
        columns.append(block[0].column)
    return columns


def _gains(columns: Sequence[Column]) -> list[Node]:
    """The tensors that multiply every column alike: weights of the norm, not of the projection."""
    gains = []
    for node in _nodes(columns[0]):
        if len(_nodes(columns[0])) > 1 and all(node in _nodes(column) for column in columns):
            rows = {tuple(_index(part, node) for part in column) for column in columns}
            if len(rows) == 1:
                gains.append(node)
    return gains


def _places(axes: Sequence[Dim], order: Sequence[int]) -> list[int]:
    """Where each vector of a tensor is once its axes are in ``order``."""
    counts = [math.prod(atom.size for atom in dim if atom.kind == "small") for dim in axes]
    strides, total = [0] * len(axes), 1
    for axis in reversed(order):
        strides[axis] = total
        total *= counts[axis]
    return [
        sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in product(*map(range, counts))
    ]


def _hoist(graph: Graph, node: Node, before: Node, never: Sequence[Node]) -> None:
    """Move ``node`` in front of ``before``, with what it is made from.

    Raises:
        Refused: it depends on what comes later.
    """
    if node < before:
        return
    late: list[Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if current < before or current in late:
            continue
        if current in never or is_in_place(current) or not current.all_input_nodes:
            raise Refused("a parameter of its coefficients is made after they are used")
        late.append(current)
        stack += current.all_input_nodes
    for current in sorted(late):
        before.prepend(current)
