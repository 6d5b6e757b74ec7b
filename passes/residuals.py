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

   A shortcut that starts with a norm and an activation of its own counts too, if it mixes once and
   the branch more often; so does the part of the origin that a slice takes (``x[:, :1] + f(x)``),
   where the branch reads more than such parts; and a skip that joins several values, each of which
   is an origin by itself (``cat([a, b]) + f(a, b)``).

Left out although they pass: ``x + conv(x)`` (a positional encoding); a single residual inside the
branch of another that is no layer in it (``y + D x`` of a state-space mixer, see `nesting`); a
value from outside added inside the branch of another (a position bias that all layers share);
everything in a model whose state is n streams already (`hyper`).

Where a graph break lies inside a branch, the graph of the sum does not show that the branch comes
from the skip; whoever calls may know (`outside`). Such a site has the trait ``graph break``.

Forms: ``identity`` (the skip is the origin), ``parallel`` (so, and two or more branches), ``scaled
skip``, ``dropout skip``, ``cast skip``, ``viewed skip`` (what lies between the two),
``projection``, ``slice`` and ``joined``.
"""

from torch.fx import Graph, Node

from mhc_compile.passes.clauses import Failure, Parting, judge
from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.forms import make_site
from mhc_compile.passes.hyper import hyper_branches, stream_mix
from mhc_compile.passes.nesting import settle
from mhc_compile.passes.outside import Ask, outside_ways
from mhc_compile.passes.reasons import STREAMS, reject, streams_reason
from mhc_compile.passes.sites import Residuals
from mhc_compile.passes.sums import SumTree, sum_trees
from mhc_compile.passes.trunks import chains


def find_residuals(graph: Graph, ask: Ask | None = None) -> Residuals:
    """The residual sites of ``graph``, their trunks, and why every other sum is none.

    Reads the graph and its metadata only. The time is linear in the graph, apart from skips that
    span most of it. In-place adds count, but should have been made functional before a rewrite.

    Args:
        graph: of Dynamo, torch.export or by hand.
        ask: knows what happened between the inputs of the graph before it ran (see `outside`).
    """
    index = FlowIndex(graph)
    trees = sum_trees(index.nodes)
    verdicts = [judge(index, tree) for tree in trees]
    crossing: set[Node] = set()
    failed = [t for t, v in zip(trees, verdicts, strict=True) if isinstance(v, Failure)]
    if ask is not None and (ways := outside_ways(index, failed, ask)):
        index = FlowIndex(graph, ways)
        for number, tree in enumerate(trees):
            if isinstance(verdicts[number], Failure):
                verdicts[number] = judge(index, tree)
                if isinstance(verdicts[number], Parting):
                    crossing.add(tree.root)
    mix = next((mix for tree in trees if (mix := stream_mix(index, tree)) is not None), None)
    if mix is not None:
        verdicts = [
            _refuse(index, tree, verdict, mix)
            for tree, verdict in zip(trees, verdicts, strict=True)
        ]
    inside = hyper_branches(index)
    verdicts = [
        Failure(STREAMS, streams_reason(inside[tree.root]))
        if isinstance(verdict, Parting) and tree.root in inside
        else verdict
        for tree, verdict in zip(trees, verdicts, strict=True)
    ]
    found = [
        (tree, make_site(index, tree, verdict, crosses=tree.root in crossing))
        for tree, verdict in zip(trees, verdicts, strict=True)
        if isinstance(verdict, Parting)
    ]
    sites, links, dropped = settle(index, [site for _, site in found])
    rejected = [
        entry
        for tree, verdict in zip(trees, verdicts, strict=True)
        if isinstance(verdict, Failure)
        for entry in reject(tree, verdict.clause, verdict.reason)
    ]
    for i, (clause, reason) in dropped.items():
        rejected += reject(found[i][0], clause, reason)
    return Residuals(
        sites=sites,
        rejected=tuple(sorted(rejected, key=lambda entry: index.position[entry.root])),
        links=links,
        trunks=chains(links),
    )


def _refuse(
    index: FlowIndex, tree: SumTree, verdict: Parting | Failure, mix: Node
) -> Parting | Failure:
    """The verdict in a model that mixes streams itself: its sites and its merges are left to it."""
    if isinstance(verdict, Parting) or stream_mix(index, tree) is not None:
        return Failure(STREAMS, streams_reason(mix))
    return verdict
