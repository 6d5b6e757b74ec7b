"""Give each site an origin of its own, where one starts from the same value as the one around it.

    y = x + f(x);  z = x + g(y)    ->    x' = alias(x);  y = x' + f(x');  z = x + g(y)

A residual around a whole trunk starts where the first site of that trunk starts. Inside its branch
that site must read the branch's input, which is another value than x once there are streams.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.sites import Residuals, ResidualSite
from mhc_compile.passes.trunks import branch_nodes
from mhc_compile.passes.values import meta_of_part, value_of


def part_origins(graph: Graph, residuals: Residuals) -> bool:
    """Insert an alias wherever a site and one inside its branch start from one value.

    Args:
        graph: canonical; changed in place.
        residuals: what `find_residuals` says of it. It must look again if something changed, and
            may then find the same one level deeper.

    Returns:
        Whether anything changed.
    """
    by_origin: dict[Node, list[ResidualSite]] = defaultdict(list)
    for site in residuals.sites:
        if not site.starts_at_skip:
            by_origin[site.origin].append(site)
    shared = {origin: sites for origin, sites in by_origin.items() if len(sites) > 1}
    index = FlowIndex(graph) if shared else None
    parted = False
    for origin, sites in shared.items():
        assert index is not None
        branch = _around_others(index, sites)
        if branch is not None:
            _alias(graph, origin, branch)
            parted = True
    return parted


def _around_others(index: FlowIndex, sites: Sequence[ResidualSite]) -> frozenset[Node] | None:
    """The branch of the outermost site that has another one inside; None if there is none."""
    for site in reversed(sites):  # in graph order: the outermost ends last
        branch = frozenset(branch_nodes(index, site))
        if any(other.root in branch for other in sites if other is not site):
            return branch
    return None


def _alias(graph: Graph, origin: Node, branch: frozenset[Node]) -> None:
    """Let what reads ``origin`` in ``branch`` read an alias of it."""
    readers = [user for user in origin.users if user in branch]
    first = next(node for node in graph.nodes if node in branch)
    with graph.inserting_before(first):
        alias = graph.call_function(torch.ops.aten.alias.default, (origin,))
    alias.meta = meta_of_part(first)
    alias.meta["example_value" if "example_value" in origin.meta else "val"] = value_of(origin)
    for reader in readers:
        reader.replace_input_with(origin, alias)
