"""The values of one state's surroundings: what is known of each node while it is being read.

A node that depends on the state has a `Value`. Any other tensor is *adopted* where it meets one:
its axes are those it is aligned with, its entries are leaves.
"""

import math
from collections.abc import Callable, Sequence

from torch.fx import Node

from mhc_compile.passes.chain_terms import NotExpressible, Terms
from mhc_compile.passes.chain_values import Atom, Dim, Value, small
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims, is_float_tensor
from mhc_compile.passes.vocabulary import CAST, LAYOUT

_PARTS = frozenset({
    "getitem", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind",
})  # fmt: skip
_MOST_ENTRIES = 8192
"""Weights of 16 streams have 288 * 16 rows; anything larger is no coefficient."""
_MOST_SMALL = 288

Known = Value | tuple[Value, ...]


class Scope:
    """Values by node, of everything computed from one root."""

    def __init__(
        self,
        root: Node,
        axes: tuple[Dim, ...],
        channels: int | None,
        read: "Callable[[Scope, Node], Known]",
        terms: Terms | None = None,
    ) -> None:
        """Start from a state, from logits, or from a small parameter.

        Args:
            root: the node that everything is computed from.
            axes: what its axes hold, see `axes_of`.
            channels: C of a state.
            read: what an operation makes of values, `chain_ops.read`.
            terms: where terms are made, of another scope.
        """
        self.terms = terms or Terms()
        self.read = read
        self.root = root
        self.axes, self.channels = axes, channels
        self.adopted: dict[Node, tuple[Dim, ...]] = {}
        """Axes of the tensors that do not depend on the root; of the last use of each."""
        self.values: dict[Node, Known] = {root: self._leaves(root, axes)}

    def value(self, node: object) -> Value | None:
        """The value of a tensor that depends on the root."""
        found = self.values.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Value) else None

    def operand(self, argument: object, like: Value) -> Value:
        """An operand of a pointwise operation whose other operand is ``like``."""
        if isinstance(argument, int | float):
            return Value((), (self.terms.const(float(argument)),))
        known = self.value(argument)
        if known is not None:
            return known
        if not isinstance(argument, Node):
            raise NotExpressible("an operand that is neither a tensor nor a number")
        rank = len(dims(argument))
        hints: list[Dim | None] = [None] * (rank - len(like.dims))
        hints += like.dims[max(0, len(like.dims) - rank) :]
        return self.adopt(argument, hints, like)

    def adopt(self, node: Node, hints: Sequence[Dim | None], like: Value) -> Value:
        """A tensor that does not depend on the root, its axes aligned with ``hints``.

        Raises:
            NotExpressible: it does not fit, or has too many entries.
        """
        if not is_float_tensor(node):
            raise NotExpressible("an operand that is no tensor of floats")
        if node in self.values:
            raise NotExpressible("an operand of several tensors")
        sizes = dims(node)
        has_channel = like.has_channel
        axes: list[Dim] = []
        for size, hint in zip(sizes, hints, strict=True):
            if size == 1:
                axes.append(())
            elif hint and hint[0].kind != "any":
                if math.prod(atom.size for atom in hint) != size:
                    raise NotExpressible("an operand that does not fit")
                axes.append(hint)
            elif size == self.channels and not has_channel:
                has_channel = True
                axes.append((Atom("channel", size),))
            elif isinstance(size, int) and size <= _MOST_SMALL:
                axes.append(small(size))
            else:
                raise NotExpressible("an operand with another axis of tokens")
        self.adopted[node] = tuple(axes)
        return self._parameters(node, tuple(axes)) or self._leaves(node, tuple(axes))

    def _parameters(self, node: Node, axes: tuple[Dim, ...]) -> Value | None:
        """A small tensor as entries of what it is a view of; None if it is no such view."""
        if any(atom.kind != "small" for dim in axes for atom in dim):
            return None
        chain = [node]
        while (above := _viewed(chain[-1])) is not None:
            chain.append(above)
        source = chain.pop()
        if not chain or math.prod(dims(source)) > _MOST_SMALL:
            return None
        all_axes = axes_of(source, range(len(dims(source))))
        view = Scope(source, all_axes, None, self.read, self.terms)
        try:
            for step in reversed(chain):
                view.values[step] = self.read(view, step)
        except NotExpressible:
            return None
        found = view.value(node)
        return found if found is not None and found.dims == axes else None

    def _leaves(self, node: Node, axes: tuple[Dim, ...]) -> Value:
        atoms = [atom for dim in axes for atom in dim]
        count = math.prod(atom.size for atom in atoms if atom.kind == "small")
        if count > _MOST_ENTRIES:
            raise NotExpressible("too many entries")
        varies = any(atom.kind == "token" for atom in atoms)
        is_vector = any(atom.kind == "channel" for atom in atoms)
        leaves = [self.terms.make("leaf", node, index, varies) for index in range(count)]
        return Value(axes, tuple(map(self.terms.unit, leaves) if is_vector else leaves))


def _viewed(node: Node) -> Node | None:
    """What ``node`` takes its entries from, if that is all it does."""
    name = op_name(node)
    if name in LAYOUT or name in CAST or name in _PARTS:
        return first_input(node)
    return None


def axes_of(root: Node, enumerated: Sequence[int], channel: int | None = None) -> tuple[Dim, ...]:
    """The axes of a tensor of which some are ``enumerated``, one is the channels, others tokens."""
    axes: list[Dim] = []
    for axis, size in enumerate(dims(root)):
        if axis in enumerated:
            axes.append(small(size))
        elif axis == channel:
            axes.append((Atom("channel", size),))
        else:
            axes.append((Atom("token", size, (axis,)),) if size != 1 else ())
    return tuple(axes)
