"""What the per-stream rules have in common: a `Lane`, a refusal, and the shape of a `Rule`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node


@dataclass(frozen=True, slots=True)
class Lane:
    """The n-stream twin of a value: a node of shape ``s[:dim] + (n,) + s[dim:]``."""

    node: Node
    dim: int
    streams: int
    gates: Node | None = None
    """What the next single-pass site reads the streams with: the gates of the last one. None before
    the first, and where sites make their own weights."""


@dataclass(frozen=True, slots=True)
class NotLiftable:
    """Why an operation cannot act on every stream alike."""

    reason: str


Lanes = Mapping[Node, Lane]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of operation acts on the streams."""

    plan: Callable[[Node, int], int | NotLiftable]
    """(operation, channel axis of its operands) -> channel axis of the result; changes nothing."""
    emit: Callable[[Graph, Node, Lanes, Lane], Node]
    """(graph, operation, lanes of its operands, one of them) -> the n-stream twin.

    The insertion point of the graph lies before the operation."""


def state_axis(axis: int, dim: int) -> int:
    """Where an axis of a value (negative) lies in its n-stream twin (negative)."""
    return axis if axis >= dim else axis - 1
