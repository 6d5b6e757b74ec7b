"""How residual sites chain: which site reads, through what, the sum of which other.

Going up from the origin of a site through what acts on every stream alike (norms, activations,
scales, layout, added embeddings) leads to the root of the site before, or to something that ends a
trunk: linear, convolution, pooling, attention, cat, split, slice, any change of size. A projection
starts a trunk of its own.
"""

from collections.abc import Container, Sequence

from torch.fx import Node

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.sites import Link, ResidualSite
from mhc_compile.passes.values import is_tensor, numel
from mhc_compile.passes.vocabulary import mixes

_SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})


def branch_nodes(index: FlowIndex, site: ResidualSite) -> tuple[Node, ...]:
    """The nodes of the branches that depend on the origin, in graph order."""
    return index.between(site.origin, site.branches)


def link_sites(index: FlowIndex, sites: Sequence[ResidualSite]) -> tuple[Link, ...]:
    """One link for each site, in their order."""
    roots = {site.root: i for i, site in enumerate(sites)}
    search = RootSearch(index, roots)
    claims: dict[int, list[int]] = {}
    for i, site in enumerate(sites):
        if site.form != "projection":
            root = search.above(site.origin)
            if root is not None:
                claims.setdefault(roots[root], []).append(i)
    previous = {_heir(index, sites, heirs): before for before, heirs in claims.items()}
    links = []
    for i, site in enumerate(sites):
        before = previous.get(i)
        region = () if before is None else index.between(sites[before].root, (site.origin,))
        links.append(Link(i, before, region))
    return tuple(links)


def chains(links: Sequence[Link]) -> tuple[tuple[int, ...], ...]:
    """The trunks: site indices chained by ``links``, ordered by their first site."""
    following = {link.previous: link.site for link in links if link.previous is not None}
    trunks = []
    for link in links:
        if link.previous is None:
            trunk = [link.site]
            while (site := following.get(trunk[-1])) is not None:
                trunk.append(site)
            trunks.append(tuple(trunk))
    return tuple(trunks)


class RootSearch:
    """Follows a trunk upwards: which site's sum does a value stem from."""

    def __init__(self, index: FlowIndex, roots: Container[Node]) -> None:
        self._index = index
        self._roots = roots
        # What varies, and what descends from a site: a trunk may start from a constant.
        self._moving: set[Node] = set()
        for node in index.nodes:
            if (
                node in roots
                or index.varies(node)
                or not self._moving.isdisjoint(index.inputs(node))
            ):
                self._moving.add(node)

    def above(self, value: Node) -> Node | None:
        """The root that ``value`` stems from (or is); None if the trunk ends in between."""
        index, node = self._index, value
        while node not in self._roots:
            if mixes(node) or op_name(node) in _SPLITS:
                return None
            inputs = [n for n in index.inputs(node) if n in self._moving]
            above = min(inputs, key=index.position.__getitem__, default=None)
            # x * rsqrt(mean(x * x)): the trunk is the input that the others are computed from
            if above is None or not all(index.depends(n, above) for n in inputs if n is not above):
                return None
            if is_tensor(above) and is_tensor(node) and numel(above) != numel(node):
                return None
            node = above
        return node


def _heir(index: FlowIndex, sites: Sequence[ResidualSite], heirs: list[int]) -> int:
    """Of the sites that read one root, the one that continues the trunk.

    It is the outer one where they are nested, the first otherwise.
    """
    for i in heirs:
        if len(heirs) > 1:
            inside = set(branch_nodes(index, sites[i]))
            if any(sites[j].root in inside for j in heirs if j != i):
                return i
    return heirs[0]
