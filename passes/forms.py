"""Names for what a site looks like: its form, and traits of its skip, branches and surroundings.

Traits: ``in place``; ``alpha`` (``torch.add(x, f, alpha=a)``); ``parallel`` (two or more branches);
``dropout``, ``scaled branch``, ``layer scale``, ``gate`` (what ends a branch: dropout, a number, a
constant tensor, a computed tensor that is broadcast); ``graph break`` (one lies in the branch).
`nesting.settle` adds ``post-norm`` (a norm
on the trunk after it) and ``nested`` (inside the branch of another site).
"""

from torch.fx import Node

from mhc_compile.passes.clauses import Parting
from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.sites import CROSSES, ResidualSite
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import numel
from mhc_compile.passes.vocabulary import CAST, DROPOUT, SCALE
from mhc_compile.passes.walks import PROJECTIONS, plain_step


def make_site(
    index: FlowIndex, tree: SumTree, parting: Parting, *, crosses: bool = False
) -> ResidualSite:
    """The site of a sum whose parting is known; ``crosses``: a graph break lies in its branch."""
    skip_at = tree.leaves.index(parting.skip)
    branches = tree.leaves[:skip_at] + tree.leaves[skip_at + 1 :]
    parallel = sum(index.varies(branch) for branch in branches) > 1
    traits = ["in place"] if tree.in_place else []
    if any(node.kwargs.get("alpha", 1) != 1 for node in (tree.root, *tree.inner)):
        traits.append("alpha")
    form = _skip_form(index, parting)
    if parallel:
        form, traits = ("parallel" if form == "identity" else form), [*traits, "parallel"]
    ends = [_tail(index, branch) for branch in branches]
    traits += [
        t for t in ("dropout", "scaled branch", "layer scale", "gate") if any(t in e for e in ends)
    ]
    return ResidualSite(
        root=tree.root,
        skip=parting.skip,
        branches=branches,
        inner=tree.inner,
        origin=parting.origin,
        skip_path=parting.skip_path,
        form=form,
        traits=(*traits, CROSSES) if crosses else tuple(traits),
        skip_at=skip_at,
    )


def _skip_form(index: FlowIndex, parting: Parting) -> str:
    if parting.joined:
        return "joined"
    if parting.projection:
        is_part = not any(op_name(node) in PROJECTIONS for node in parting.skip_path)
        return "slice" if is_part else "projection"
    names = [op_name(node) for node in parting.skip_path]
    if any(name in SCALE for name in names):
        return "scaled skip"
    if any(name in DROPOUT for name in names):
        return "dropout skip"
    if any(name in CAST for name in names):
        return "cast skip"
    return "viewed skip" if names else "identity"


def _tail(index: FlowIndex, branch: Node) -> set[str]:
    """What ends a branch, back to the first operation that is no copy, scale or gate."""
    found: set[str] = set()
    node: Node | None = branch
    while node is not None:
        if op_name(node) in DROPOUT:
            found.add("dropout")
        above = plain_step(index, node)
        if op_name(node) in SCALE:
            factors = [arg for arg in node.args[:2] if isinstance(arg, Node)]
            if above is None:
                above = _gated(factors, node)
                found |= {"gate"} if above is not None else set()
            else:
                found.add("layer scale" if len(factors) > 1 else "scaled branch")
        node = above
    return found


def _gated(factors: list[Node], product: Node) -> Node | None:
    full = [factor for factor in factors if numel(factor) == numel(product)]
    return full[0] if len(full) == 1 and len(factors) == 2 else None
