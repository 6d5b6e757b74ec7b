"""Residual sites of a graph: which sums are ``x + f(x)``, found by structure alone.

A maximal sum tree (`sums.SumTree`) is a site if one of its leaves, the *skip*, is a copy of a value
that another leaf, the *branch*, computes with. Eight clauses decide (`clauses`); none looks at a
name of a module, a class or a function of the model:

1. shape: the skip has the shape of the sum.
2. origin: going up from the skip through layout, casts, dropout, scales and constant factors, some
   node is read by another leaf too. The first is the origin.
3. nearest only: only that first node counts.
4. branch: the branch has no other reader.
5. mixing: on the way from the origin to the branch something mixes positions or channels: matrix
   product, convolution, attention, FFT, pooling, recurrence, scatter, or code that is not shown.
6. flow: dependence runs along floats only (`flow.FlowIndex`).
7. nothing is asked of where the skip comes from: zeros and parameters may start a trunk.
8. projection, tried last: the skip may be an affine image of the origin (a strided convolution and
   its norm); then the way to the branch must also bend, or a sum of two linear maps would count.

Left out although they pass: ``x + conv(x)`` (a positional encoding) and a single residual inside
the branch of another (the ``y + D x`` of a state-space mixer).

Forms: ``identity`` (the skip is the origin), ``parallel`` (so, and two or more branches), ``scaled
skip``, ``dropout skip``, ``cast skip``, ``viewed skip`` (what lies between the two) and
``projection``.
"""

from torch.fx import Graph

from mhc_compile.passes.clauses import Failure, judge
from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.forms import make_site, mark_surroundings
from mhc_compile.passes.reasons import NESTED, nested_reason, reject
from mhc_compile.passes.sites import Link, Rejected, ResidualSite, Residuals
from mhc_compile.passes.sums import SumTree, sum_trees
from mhc_compile.passes.trunks import chains, link_sites, nests


def find_residuals(graph: Graph) -> Residuals:
    """The residual sites of ``graph``, their trunks, and why every other sum is none.

    Reads the graph and its metadata only. The time is linear in the graph, apart from skips that
    span most of it. In-place adds count, but should have been made functional before a rewrite.
    """
    index = FlowIndex(graph)
    trees: list[SumTree] = []
    sites: list[ResidualSite] = []
    rejected: list[Rejected] = []
    for tree in sum_trees(index.nodes):
        verdict = judge(index, tree)
        if isinstance(verdict, Failure):
            rejected += reject(tree, verdict.clause, verdict.reason)
        else:
            trees.append(tree)
            sites.append(make_site(index, tree, verdict))

    links = link_sites(index, sites)
    outer = nests(index, sites)
    dropped = {chain[0] for chain in chains(links) if len(chain) == 1 and chain[0] in outer}
    for i in dropped:
        reason = nested_reason(sites[i].origin, sites[outer[i]].root)
        rejected += reject(trees[i], NESTED, reason)
    kept = [i for i in range(len(sites)) if i not in dropped]
    renumbered = {old: new for new, old in enumerate(kept)}
    links = tuple(
        Link(
            renumbered[links[i].site],
            None if (before := links[i].previous) is None else renumbered[before],
            links[i].region,
        )
        for i in kept
    )
    return Residuals(
        sites=mark_surroundings(
            [sites[i] for i in kept], links, {renumbered[i] for i in outer if i in renumbered}
        ),
        rejected=tuple(sorted(rejected, key=lambda entry: index.position[entry.root])),
        links=links,
        trunks=chains(links),
    )
