"""The eight clauses of the residual definition, applied to one sum tree (see `residuals`)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from mhc_compile.passes.flow import SINGLE, FlowIndex
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.reasons import (
    BRANCH,
    LINEAR,
    MIXING,
    ORIGIN,
    POSITIONAL,
    SHAPE,
    STAGES,
    branch_reason,
    linear_reason,
    mixing_reason,
    origin_reason,
    positional_reason,
    shape_reason,
)
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import dims, is_tensor, rank
from mhc_compile.passes.vocabulary import ACTIVATION, BENDS, CONVOLUTION, MIXES, mixes
from mhc_compile.passes.walks import (
    PROJECTIONS,
    activated_walk,
    affine_walk,
    is_slice,
    plain_step,
    plain_walk,
)


@dataclass(frozen=True, slots=True)
class Parting:
    """A leaf that can be the skip of a sum, and where it parts from the branch."""

    skip: Node
    origin: Node
    skip_path: tuple[Node, ...]
    projection: bool
    joined: bool = False
    """Whether the skip puts several values together, of which the origin is the latest."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why no leaf of a sum can be the skip: what the one that came furthest failed."""

    clause: str
    reason: str


def judge(index: FlowIndex, tree: SumTree) -> Parting | Failure:
    """Where skip and branch of ``tree`` part, or why it is no residual."""
    plain = _try_leaves(index, tree, plain_walk, MIXES)
    if isinstance(plain, Parting):
        convolution = _lone_convolution(index, tree, plain)
        if convolution is not None:
            return Failure(POSITIONAL, positional_reason(plain.skip, convolution))
        return plain
    projected = _try_leaves(index, tree, affine_walk, MIXES | BENDS)
    if isinstance(projected, Parting) or projected.clause == LINEAR:
        return projected
    activated = _try_leaves(index, tree, activated_walk, MIXES | BENDS)
    if isinstance(activated, Parting) and _is_shorter(index, tree, activated):
        return activated
    return _try_joined(index, tree) or plain


def _try_leaves(
    index: FlowIndex,
    tree: SumTree,
    walk: Callable[[FlowIndex, Node], tuple[Node, ...]],
    needed: int,
) -> Parting | Failure:
    best: Parting | None = None
    worst = Failure(SHAPE, shape_reason(tree))
    for i, leaf in enumerate(tree.leaves):
        if dims(leaf) != dims(tree.root):
            continue
        others = tree.leaves[:i] + tree.leaves[i + 1 :]
        result = _part(index, tree.root, leaf, others, walk(index, leaf), needed)
        if isinstance(result, Failure):
            worst = max(worst, result, key=lambda failure: STAGES.index(failure.clause))
        elif best is None or index.position[result.origin] > index.position[best.origin]:
            best = result
    return best or worst


def _is_shorter(index: FlowIndex, tree: SumTree, parting: Parting) -> bool:
    """Whether the skip mixes once and the rest more often: it is no branch among equals."""
    others = [leaf for leaf in tree.leaves if leaf is not parting.skip]
    below = index.between(parting.origin, others)
    return sum(map(mixes, parting.skip_path)) == 1 < sum(map(mixes, below))


def _try_joined(index: FlowIndex, tree: SumTree) -> Parting | None:
    """A skip put together from values that the branch comes from, each of them by clauses 2 to 5.

    ``cat([a, b]) + f(a, b)`` is the residual of the joint value, which the branch need not read in
    this form.
    """
    for i, leaf in enumerate(tree.leaves):
        walk = plain_walk(index, leaf)
        joint = walk[-1]
        if dims(leaf) != dims(tree.root) or op_name(joint) != "cat":
            continue
        others = tree.leaves[:i] + tree.leaves[i + 1 :]
        ways = [plain_walk(index, part) for part in index.varying_inputs(joint)]
        found = [_part(index, tree.root, way[0], others, way, MIXES) for way in ways]
        partings = [part for part in found if isinstance(part, Parting)]
        if partings and len(partings) == len(ways):
            last = max(partings, key=lambda part: index.position[part.origin])
            return Parting(leaf, last.origin, (*walk, *last.skip_path), False, joined=True)
    return None


def _part(
    index: FlowIndex,
    root: Node,
    skip: Node,
    others: tuple[Node, ...],
    walk: tuple[Node, ...],
    needed: int,
) -> Parting | Failure:
    """Clauses 2 to 5, or 8 where ``needed`` asks for a way that bends."""
    # Another leaf can only depend on a node that something beside the walk reads.
    hit = index.nearest(others, [node for node in walk if index.readers(node) > 1])
    if hit is None:
        return Failure(ORIGIN, origin_reason(skip))
    origin, paths = hit
    path = walk[: walk.index(origin)]
    projection = bool(needed & BENDS)
    if not paths.any(MIXES):
        return Failure(MIXING, mixing_reason(skip, origin))
    if not paths.any(MIXES | SINGLE):
        return Failure(BRANCH, branch_reason(skip, origin))
    if projection and not _projects(index, root, others, origin, path):
        return Failure(ORIGIN, origin_reason(skip))
    if not paths.any(needed | SINGLE):
        return Failure(LINEAR, linear_reason(skip, origin))
    return Parting(skip, origin, path, projection)


def _projects(
    index: FlowIndex, root: Node, others: tuple[Node, ...], origin: Node, path: tuple[Node, ...]
) -> bool:
    """The guards of clause 8: a real projection, of a varying value, that keeps the rank.

    Or a slice of one of which the branch reads more than other slices: parts of a value that are
    worked on apart and added up (``f(x[:, :c]) + x[:, c:]``) are no residual.
    """
    if not index.varies(origin) or rank(origin) != rank(root):
        return False
    if not any(is_slice(node) for node in path):
        return any(op_name(node) in PROJECTIONS for node in path)
    return any(
        origin in index.inputs(node) and not is_slice(node)
        for node in index.between(origin, others)
    )


def _lone_convolution(index: FlowIndex, tree: SumTree, parting: Parting) -> Node | None:
    """The convolution of ``x + conv(x)``; None if some branch is more than that.

    An activation after it is allowed where the convolution is grouped: such a convolution mixes
    neighbours and not channels, which tells where a token stands.
    """
    found: Node | None = None
    for branch in (leaf for leaf in tree.leaves if leaf is not parting.skip and index.varies(leaf)):
        convolution: Node | None = None
        bent = False
        node: Node | None = branch
        while node is not None and node is not parting.origin:
            name = op_name(node)
            if name in CONVOLUTION and convolution is None:
                convolution = node
            elif name in ACTIVATION:
                bent = True
            elif name not in _TRIMS and plain_step(index, node) is None:
                return None
            varying = index.varying_inputs(node)
            node = varying[0] if len(varying) == 1 else None
        if node is None or convolution is None or (bent and not _grouped(convolution)):
            return None
        found = convolution
    return found


_TRIMS = frozenset({"getitem", "slice", "narrow", "pad", "constant_pad_nd"})


def _grouped(convolution: Node) -> bool:
    value, weight = (arg for arg in convolution.args[:2])
    if not (isinstance(value, Node) and isinstance(weight, Node) and is_tensor(weight)):
        return False
    channel = rank(value) - rank(weight) + 1
    return dims(weight)[1] != dims(value)[channel]
