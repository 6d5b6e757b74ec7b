"""Tells that a model is hyper-connected already: its state is n streams that it mixes itself.

The mark of it is a matrix that a model computes per token to mix streams: n * n coefficients made
flat and folded into an n x n matrix, multiplied with the state, and the product is a term of a
sum (``H_res X + post * f`` in DeepSeek-V4, ``X A + X`` in AltUp). Attention has square matrices
too, but computes each entry from two tokens: above them lies a product of two activations.
"""

import operator

from torch.fx import Node

from mhc_compile.kernels.spec import MAX_STREAMS
from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.states import POST, PRE
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import dims, is_tensor
from mhc_compile.passes.vocabulary import LAYOUT, MATMUL, mixes
from mhc_compile.passes.walks import plain_walk


def hyper_branches(index: FlowIndex) -> dict[Node, Node]:
    """Nodes in the branches of sites that are mhc ops already, each with the post of its site."""
    inside: dict[Node, Node] = {}
    for post in index.nodes:
        if post.target is POST:
            for read in _branch_inputs(post):
                branch = post.args[1]
                assert isinstance(branch, Node)
                inside.update(dict.fromkeys(index.between(read, (branch,)), post))
    return inside


def _branch_inputs(post: Node) -> list[Node]:
    """What the pre of the same site reads out of the streams."""
    node = post.args[2]
    while isinstance(node, Node) and node.target is not PRE:
        node = node.args[0] if node.args else None
    if not isinstance(node, Node):
        return []
    return [part for part in node.users if part.target is operator.getitem and part.args[1] == 0]


def stream_mix(index: FlowIndex, tree: SumTree) -> Node | None:
    """The product that mixes streams and is a term of ``tree``; None if there is none."""
    for leaf in tree.leaves:
        product = plain_walk(index, leaf)[-1]
        if op_name(product) in MATMUL and any(
            _mixes_streams(index, factor) for factor in product.all_input_nodes if is_tensor(factor)
        ):
            return product
    return None


def _mixes_streams(index: FlowIndex, matrix: Node) -> bool:
    """Whether ``matrix`` is square, small and folded from flat coefficients."""
    shape = dims(matrix)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] not in range(2, MAX_STREAMS + 1):
        return False
    folded = False
    stack, seen = [matrix], {matrix}
    while stack:
        node = stack.pop()
        source = node.args[0] if node.args else None
        if op_name(node) in LAYOUT and isinstance(source, Node):
            flat = dims(source)
            if len(flat) < len(dims(node)) and flat[-1:] == (shape[-1] ** 2,):
                folded = True
                continue
        if mixes(node) or _moves_matrix(node):
            return False
        above = [n for n in index.varying_inputs(node) if n not in seen]
        stack += above
        seen.update(above)
    return folded


def _moves_matrix(node: Node) -> bool:
    """Whether other axes take the place of the last two: heads of attention, no matrix a token."""
    if op_name(node) not in ("permute", "transpose", "movedim", "moveaxis"):
        return False
    rank = len(dims(node))
    axes = node.args[1] if len(node.args) == 2 else node.args[1:]
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, int) for axis in axes):
        return True
    kept = axes[-2:] if op_name(node) == "permute" else axes
    return {int(axis) % rank for axis in kept} != {rank - 1, rank - 2}
