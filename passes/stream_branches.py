"""Which kernels of a graph go to the side stream: those of the streams around MLP branches.

A branch holds attention if it multiplies two values that both come from data; an MLP multiplies
data by weights alone. In the backward each such product gives two: the gradient of its result is
multiplied by either operand, and both ways lead on to the input of the branch. So nothing has to
know weights from saved activations, or the name of a module. Operators that are not torch's are
judged by how many values they read.
"""

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from mhc_compile.passes.collectives import is_collective, is_wait
from mhc_compile.passes.opnames import is_mhc, op_name, two_inputs
from mhc_compile.passes.states import POST, PRE, SEAM, SEAM_NORM
from mhc_compile.passes.stream_graph import kernel_inputs, kernel_users, launches, maker
from mhc_compile.passes.values import carries_float
from mhc_compile.passes.vocabulary import CONVOLUTION, MATMUL, RECURRENT, is_opaque

_BRANCH, _STATE = (
    torch.ops.mhc.post_backward_branch.default,
    torch.ops.mhc.post_backward_state.default,
)
_BACKWARD = (
    torch.ops.mhc.post_backward.default,
    torch.ops.mhc.seam_backward.default,
    torch.ops.mhc.seam_backward_dz.default,
    torch.ops.mhc.seam_norm_backward.default,
    _BRANCH,
)
_REPLAYED = (PRE, POST, SEAM, torch.ops.mhc.replay.default)
_PRODUCTS = MATMUL | CONVOLUTION
_DF = 1
"""Which result of a backward of post or seam is the gradient of the branch output."""
_OF_A_PRODUCT = 3
"""Operands of the backward of a product: its gradient and two factors. Attention has more."""


def side_kernels(graph: Graph) -> set[Node]:
    """The kernels of the streams that belong to MLP branches, and those that wait for no gradient.

    The first are the post or seam of such a branch, and its backward; the pre of the next site,
    where a block of recomputation keeps it from being joined to a seam; and what only they read:
    the second halves of split mappings, sums of gradients of the state. The second are what a
    backward makes again: a graph with backwards has every other op for that alone.

    Args:
        graph: a forward or a backward graph of AOTAutograd, or one that has no gradients.
    """
    backward = {node: _is_mlp_backward(node) for node in graph.nodes if node.target in _BACKWARD}
    chosen = {node for node, is_mlp in backward.items() if is_mlp}
    for node in graph.nodes:
        is_replay = bool(backward) and node.target in _REPLAYED
        is_next = node.target is PRE and maker(node.args[0]) in chosen
        is_exit = node.target in (POST, SEAM, SEAM_NORM) and _is_mlp_forward(_branch_output(node))
        is_rest = node.target is _STATE and _branch_of(node) in chosen
        if is_replay or is_next or is_exit or is_rest:
            chosen.add(node)
    for node in reversed(graph.nodes):
        if is_mhc(node) or _is_sum_of_states(node):
            users = {user for user in kernel_users(node) if user.op != "output"}
            serves_only = bool(users) and users <= chosen
            is_entry = bool(backward) and any(user.target in _REPLAYED for user in users)
            if serves_only or is_entry:
                chosen.add(node)
    return chosen


def _is_sum_of_states(node: Node) -> bool:
    """Whether the node adds gradients of the state that ops of the streams have made."""
    if node.target is not torch.ops.aten.add.Tensor:
        return False
    return all(is_mhc(n) or _is_sum_of_states(n) for n in kernel_inputs(node))


def _branch_output(node: Node) -> Node:
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    f = node.args[names.index("f")]
    assert isinstance(f, Node)
    return maker(f)


def _is_mlp_forward(f: Node) -> bool:
    """Whether nothing above ``f``, up to the ops of the streams, multiplies data by data."""
    if not launches(f) or is_mhc(f):
        return False
    data: dict[Node, bool] = {}
    for node in sorted(_above(f)):
        if _is_attention(node):
            return False
        operands = _multiplied(node)
        data[node] = bool(operands) or any(
            data.get(source, is_mhc(source)) for source in kernel_inputs(node)
        )
        if sum(data.get(source, is_mhc(source)) for source in operands) > 1:
            return False
    return True


def _is_mlp_backward(node: Node) -> bool:
    """Whether no gradient between the output and the input of the branch is multiplied twice."""
    given = [node] if node.target is _BRANCH else [u for u in node.users if _part(u) == _DF]
    region = {kernel for df in given for kernel in _between(df)}
    gradients: set[Node] = set()
    for kernel in region:
        operands = _multiplied(kernel)
        hidden = _is_foreign(kernel) and len(operands) > _OF_A_PRODUCT
        own = operands & (region | {node})
        if _is_attention(kernel) or hidden or (not _is_foreign(kernel) and own & gradients):
            return False
        gradients |= own
    return bool(region)


def _branch_of(state: Node) -> Node | None:
    """The other part of a backward of post that was split."""
    dY = state.args[0]
    assert isinstance(dY, Node)
    return next((user for user in dY.users if user.target is _BRANCH), None)


def _part(user: Node) -> object:
    return user.args[1] if user.target is operator.getitem else None


def _above(f: Node) -> set[Node]:
    """The kernels that ``f`` is computed by, up to the ops of the streams."""
    found, stack = set[Node](), [f]
    while stack:
        node = stack.pop()
        if node not in found and launches(node) and not is_mhc(node):
            found.add(node)
            stack.extend(kernel_inputs(node))
    return found


def _between(df: Node) -> set[Node]:
    """The kernels on the ways from ``df`` to the next ops of the streams."""
    below, stack = list[Node](), list(kernel_users(df))
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen and node.op != "output" and not is_mhc(node):
            seen.add(node)
            below.append(node)
            stack.extend(kernel_users(node))
    found: set[Node] = set()
    for node in sorted(below, reverse=True):
        if any(user in found or is_mhc(user) for user in kernel_users(node)):
            found.add(node)
    return found


def _multiplied(node: Node) -> set[Node]:
    """What made the factors of a product; of a foreign operator all that it reads of floats."""
    if _is_foreign(node):
        return {maker(source) for source in node.all_input_nodes if carries_float(source)}
    return set(map(maker, two_inputs(node) or ())) if op_name(node) in _PRODUCTS else set()


def _is_foreign(node: Node) -> bool:
    """Whether an operator is none of torch's: a product, a scan, attention."""
    return is_opaque(node) and not is_collective(node) and not is_wait(node)


def _is_attention(node: Node) -> bool:
    name = op_name(node)
    return "attention" in name or name in RECURRENT
