"""What the search for residuals hands out: sites, rejected sums, links between sites."""

from dataclasses import dataclass

from torch.fx import Node

CROSSES = "graph break"
"""The trait of a site whose branch runs through a graph break."""


@dataclass(frozen=True, slots=True)
class ResidualSite:
    """One ``x + f(x)``, or ``x + f(x) + g(x)``."""

    root: Node
    """The last add of the sum."""
    skip: Node
    """The leaf of the sum that carries the residual."""
    branches: tuple[Node, ...]
    """All other leaves, in reading order."""
    inner: tuple[Node, ...]
    """The other adds of the sum."""
    origin: Node
    """The value at which skip and branch part."""
    skip_path: tuple[Node, ...]
    """From ``skip`` up to, not including, ``origin``; empty if the skip is the origin."""
    form: str
    """See `mhc_compile.passes.residuals`."""
    traits: tuple[str, ...]
    """What else is special about it: see `mhc_compile.passes.forms`."""
    skip_at: int = 0
    """Position of the skip among the leaves of the sum, in reading order."""

    @property
    def crosses(self) -> bool:
        """Whether its branch runs through a graph break: none of it may be in this graph."""
        return CROSSES in self.traits

    @property
    def starts_at_skip(self) -> bool:
        """Whether the skip is another value than the origin, so that no streams pass through it."""
        return self.form in ("projection", "slice", "joined")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A sum of two float tensors that is no residual site."""

    root: Node
    clause: str
    """What it failed, of the skip candidate that came furthest."""
    reason: str
    """The same for a person, naming the nodes."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a site continues a trunk."""

    site: int
    """Index in `Residuals.sites`."""
    previous: int | None
    """The site whose root the origin comes from; None if this site starts a trunk."""
    region: tuple[Node, ...]
    """The nodes after the previous root, up to and including the origin, on a way between the two,
    in graph order: what lies on the trunk. Empty if the origin is that root, or without one."""


@dataclass(frozen=True, slots=True)
class Residuals:
    """Every sum of float tensors of a graph: the residual sites, how they chain, and the rest."""

    sites: tuple[ResidualSite, ...]
    """In graph order of the root."""
    rejected: tuple[Rejected, ...]
    """In graph order. An inner add of a rejected sum is listed as well."""
    links: tuple[Link, ...]
    """One for each site, in their order."""
    trunks: tuple[tuple[int, ...], ...]
    """Chains of site indices, ordered by their first site."""
