"""How residual sites chain: which site reads, through what, the sum of which other.

Going up from the origin of a site through what acts on every stream alike (norms, activations,
scales, masks, layout, added embeddings) leads to the root of the site before, or to something that
ends a trunk: linear, convolution, pooling, attention, cat, split, slice, any change of size. A
projection starts a trunk of its own.
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
        if not site.starts_at_skip:
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
        # What descends from a site, which may start from a constant.
        self._descends: set[Node] = set()
        for node in index.nodes:
            if node in roots or not self._descends.isdisjoint(index.inputs(node)):
                self._descends.add(node)

    def above(self, value: Node) -> Node | None:
        """The root that ``value`` stems from (or is); None if the trunk ends in between."""
        index, node = self._index, value
        beside: list[Node] = []  # what was computed from the trunk, and meets it again
        while node not in self._roots:
            if mixes(node) or op_name(node) in _SPLITS:
                return None
            inputs = [n for n in index.inputs(node) if n in self._descends or index.varies(n)]
            if is_tensor(node):
                whole = [n for n in inputs if not is_tensor(n) or numel(n) == numel(node)]
            else:
                whole = inputs
            above = min(whole, key=index.position.__getitem__, default=None)
            if above is None:
                return None
            # A mask or a gate that no site has a part in acts on all streams alike.
            beside += [n for n in inputs if n is not above and (n in self._descends or n in whole)]
            node = above
        return node if all(self._accompanies(n, node) for n in beside) else None

    def _accompanies(self, value: Node, root: Node) -> bool:
        """Whether ``value`` is a statistic of the trunk: ``mean(x * x)`` in a written-out norm.

        It is computed from the root, and by nothing that mixes.
        """
        between = self._index.between(root, (value,))
        return value is root or (value in between and not any(mixes(n) for n in between))


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
