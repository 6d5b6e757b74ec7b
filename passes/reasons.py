"""Why a sum is no residual site, in a sentence that names the nodes."""

from torch.fx import Node

from mhc_compile.passes.sites import Rejected
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import describe, dims

# In the order in which a candidate passes them: a sum is rejected for the last one it reached.
SHAPE = "shape"
ORIGIN = "origin"
MIXING = "mixing"
BRANCH = "branch"
LINEAR = "linear branches"
POSITIONAL = "positional convolution"
NESTED = "nested"
INJECTED = "injected"
STREAMS = "already hyper-connected"
STAGES = (SHAPE, ORIGIN, MIXING, BRANCH, LINEAR)


def reject(tree: SumTree, clause: str, reason: str) -> tuple[Rejected, ...]:
    """``tree`` rejected: one entry for each of its adds."""
    part = f"part of the sum {describe(tree.root)}: {reason}"
    nodes = [Rejected(node, clause, part) for node in tree.inner]
    return (*nodes, Rejected(tree.root, clause, reason))


def shape_reason(tree: SumTree) -> str:
    """No operand has the shape of the sum: both are broadcast."""
    shapes = " and ".join(f"{describe(leaf)} {_shape(leaf)}" for leaf in tree.leaves)
    return f"no operand has the shape {_shape(tree.root)} of the sum to be its skip: {shapes}"


def origin_reason(skip: Node) -> str:
    """Skip and the rest have no common origin."""
    return f"nothing that is added to {describe(skip)} is computed from it: two independent values"


def mixing_reason(skip: Node, origin: Node) -> str:
    """The other operand is a pointwise function of the origin."""
    return (
        f"what is added to {describe(skip)} is computed from {describe(origin)} without mixing "
        "positions or channels (no matrix product, convolution, attention, pooling, ...): "
        "an elementwise formula"
    )


def branch_reason(skip: Node, origin: Node) -> str:
    """The branch is read elsewhere."""
    return (
        f"what is added to {describe(skip)} and computed from {describe(origin)} is read by other "
        "nodes as well: the skip is added to a trunk, it is not one"
    )


def linear_reason(skip: Node, origin: Node) -> str:
    """A sum of linear maps of one value."""
    return (
        f"{describe(skip)} and the other operand are both linear in {describe(origin)}: "
        "a sum of linear branches, no residual around a nonlinear one"
    )


def positional_reason(skip: Node, convolution: Node) -> str:
    """``x + conv(x)``."""
    return (
        f"the branch added to {describe(skip)} is the single convolution {describe(convolution)}: "
        "a positional encoding, not a layer"
    )


def nested_reason(origin: Node, outer: Node) -> str:
    """A single residual inside a branch."""
    return (
        f"its origin {describe(origin)} lies inside the branch of the residual {describe(outer)}, "
        "no second site follows, and it reads more of that branch than its origin or adds what "
        "ends in no weights of its own: part of the branch, no layer"
    )


def injected_reason(origin: Node, outer: Node) -> str:
    """A value from outside added inside a branch."""
    return (
        f"it adds {describe(origin)}, a value from outside, inside the branch of the residual "
        f"{describe(outer)}: an input of that branch, no trunk"
    )


def streams_reason(mix: Node) -> str:
    """The model has streams of its own."""
    return (
        f"the model mixes residual streams of its own ({describe(mix)} multiplies them with a "
        "matrix made per token): it is hyper-connected already"
    )


def _shape(node: Node) -> str:
    return "[" + ", ".join(str(size) for size in dims(node)) + "]"
