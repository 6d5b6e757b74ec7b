"""`GraphView`: what a picture shows, before anything decides where it stands.

Nodes are in execution order and are known by their position in it: no edge points backwards.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "input", "output", "box", "add", "trunk", "expand", "pre", "post", "seam", "collapse"
]
"""``box`` is a module or some operations, ``trunk`` an operation between two sites, ``add`` a
residual add; the last five are mhc ops."""

SPINE: frozenset[Role] = frozenset({"add", "trunk", "expand", "post", "seam"})
"""Roles that stand on the line of a trunk."""

Kind = Literal["state", "data", "coefficients"]
"""A value of a trunk, any other value, or the mappings that a site has computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewNode:
    """One box of a picture."""

    lines: tuple[str, ...]
    """Its label."""
    role: Role
    column: int
    """Nesting: 0 for the outermost trunk, 1 for its branches, 2 for branches of trunks in those."""
    path: str
    """The module it lies in; "" is the root."""
    ops: int = 1
    """How many operations of the graph it stands for."""
    title: str = ""
    """More about it, for a tool tip: where in the source it comes from."""


@dataclass(frozen=True, slots=True, order=True)
class ViewEdge:
    """One line of a picture."""

    source: int
    target: int
    kind: Kind = "data"
    streams: int = 1
    """Lanes of a state; 1 before the rewrite."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Nodes ``first`` to ``last`` stand for ``times`` identical layers."""

    first: int
    last: int
    times: int
    label: str


@dataclass(frozen=True, slots=True)
class GraphView:
    """One graph, ready to be laid out."""

    nodes: tuple[ViewNode, ...]
    edges: tuple[ViewEdge, ...]
    frames: tuple[Frame, ...] = ()
    notes: tuple[str, ...] = ()
    """What the picture leaves out."""
