"""Sites inside the branches of others: which are kept, and what trunks tell about a site.

Branches may hold whole trunks (a transformer inside a U-Net), or one layer around which a block has
a second skip. A single site inside a branch is such a layer only if it stands in line, with nothing
of the branch led past its origin, and what it adds ends in weights of its own. Otherwise it is a
part of the branch: ``y + D x`` of a state-space mixer, queries that an attention adds to what it
makes of keys and values. A
single site whose sum lies inside a branch that its origin does not come from adds a foreign value
there: a position bias that all layers share is computed with by the first layer, so every later
layer seems to compute the other operand from it. A site that starts from the same value as the one
around it (or from an alias of it, see `origins`) is neither.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.reasons import INJECTED, NESTED, injected_reason, nested_reason
from mhc_compile.passes.sites import Link, ResidualSite
from mhc_compile.passes.trunks import branch_nodes, chains, link_sites
from mhc_compile.passes.vocabulary import NORM, mixes

Dropped = dict[int, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Nesting:
    """Where a site lies with respect to one other."""

    outer: int
    """The site inside whose branch the sum lies."""
    inside: bool
    """Whether the origin lies there too; otherwise it comes from elsewhere."""


def settle(
    index: FlowIndex, sites: Sequence[ResidualSite]
) -> tuple[tuple[ResidualSite, ...], tuple[Link, ...], Dropped]:
    """The sites worth keeping, with their links, and clause and reason of each other one.

    The keys of the last are indices of ``sites``; the links have those of the first.
    """
    links = link_sites(index, sites)
    nestings = _nestings(index, sites)
    single = {chain[0] for chain in chains(links) if len(chain) == 1}
    dropped: Dropped = {}
    for i in sorted(single & nestings.keys()):
        origin, outer = sites[i].origin, sites[nestings[i].outer].root
        if nestings[i].inside and _is_layer(index, sites[i], sites[nestings[i].outer]):
            continue
        if nestings[i].inside:
            dropped[i] = (NESTED, nested_reason(origin, outer))
        else:
            dropped[i] = (INJECTED, injected_reason(origin, outer))
    kept = [i for i in range(len(sites)) if i not in dropped]
    number: dict[int | None, int | None] = {
        None: None,
        **{old: new for new, old in enumerate(kept)},
    }
    links = tuple(
        replace(links[old], site=new, previous=number[links[old].previous])
        for new, old in enumerate(kept)
    )
    remaining = [sites[i] for i in kept]
    if dropped:  # what lay inside the branch of a dropped site only is not nested
        nestings = _nestings(index, remaining)
    nested = {i for i, nesting in nestings.items() if nesting.inside}
    return _mark(remaining, links, nested), links, dropped


def _is_layer(index: FlowIndex, site: ResidualSite, outer: ResidualSite) -> bool:
    """Whether a site inside a branch is the way of that branch, and ends in weights of its own."""
    branch = set(branch_nodes(index, site))
    around = {outer.origin, *branch_nodes(index, outer)} - branch - {site.origin}
    return _ends_in_weights(index, site, branch) and all(
        around.isdisjoint(index.inputs(node)) for node in branch
    )


def _ends_in_weights(index: FlowIndex, site: ResidualSite, branch: Collection[Node]) -> bool:
    """Whether the last thing that mixes is a product with weights, on every way down."""
    stack = [leaf for leaf in site.branches if leaf in branch]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = index.inputs(node)
        if not mixes(node):
            stack += [n for n in inputs if n in branch]
        elif all(index.varies(n) for n in inputs):
            return False
    return True


def _nestings(index: FlowIndex, sites: Sequence[ResidualSite]) -> Mapping[int, Nesting]:
    """For each site whose sum lies inside the branch of others: the innermost such other."""
    at = {site.root: i for i, site in enumerate(sites)}
    found: dict[int, Nesting] = {}
    spans: dict[int, int] = {}
    for outer, site in enumerate(sites):
        region = set(branch_nodes(index, site))
        span = index.position[site.root] - index.position[site.origin]
        for i in (at[node] for node in region & at.keys()):
            origin = sites[i].origin
            # A residual around a whole trunk starts where the first of its sites starts.
            if _without_aliases(origin) is not _without_aliases(site.origin) and span < spans.get(
                i, len(index.nodes)
            ):
                found[i] = Nesting(outer, origin in region)
                spans[i] = span
    return found


def _without_aliases(node: Node) -> Node:
    while op_name(node) == "alias" and (source := first_input(node)) is not None:
        node = source
    return node


def _mark(
    sites: Sequence[ResidualSite], links: Sequence[Link], nested: set[int]
) -> tuple[ResidualSite, ...]:
    """The sites with the traits that only their trunk shows: ``post-norm`` and ``nested``."""
    normed = {link.previous for link in links if any(_normalises(node) for node in link.region)}
    for link in links:  # the last of a trunk: if the others are followed by a norm, so is it
        readers = list(sites[link.site].root.users)
        if link.previous in normed and len(readers) == 1 and _normalises(readers[0]):
            normed.add(link.site)
    return tuple(
        replace(
            site,
            traits=site.traits + ("post-norm",) * (i in normed) + ("nested",) * (i in nested),
        )
        for i, site in enumerate(sites)
    )


def _normalises(node: Node) -> bool:
    return op_name(node) in NORM or op_name(node) == "rsqrt"
