"""How one operation of the trunk acts on an n-stream state.

Between two sites a trunk may hold operations: a norm (post-norm models), an activation (ResNets), a
scale, a cast, a view. ``lane(op)(X)[i] = op(X[i])`` for every stream i, so equal streams stay
equal. The state of a value of shape s with channel axis ``dim`` has shape
``s[:dim] + (n,) + s[dim:]``: the stream axis stands directly before the channel axis.

Each rule plans first (what is the channel axis of the result, or why can it not be done) and only
then emits, so that a refusal never leaves half a rewrite behind.
"""

from collections.abc import Mapping

from torch.fx import Graph, Node

from mhc_compile.passes.lane import Lane, Lanes, NotLiftable
from mhc_compile.passes.lane_norms import NORMS, REDUCTIONS
from mhc_compile.passes.lane_pointwise import DROPOUT, POINTWISE
from mhc_compile.passes.lane_views import VIEWS
from mhc_compile.passes.opnames import first_input, is_in_place, op_name
from mhc_compile.passes.values import dims, is_tensor, meta_of_part, rank

_RULES = {**POINTWISE, **DROPOUT, **NORMS, **REDUCTIONS, **VIEWS}


def plan_lane(node: Node, dims: Mapping[Node, int]) -> int | NotLiftable:
    """The channel axis (negative) of the n-stream twin of ``node``, or why there is none.

    Args:
        node: the operation.
        dims: channel axis of each operand that has streams; at least one has.
    """
    name = op_name(node)
    operands = [arg for arg in node.all_input_nodes if arg in dims]
    if len({(dims[arg], rank(arg)) for arg in operands}) != 1:
        return NotLiftable(f"{name} joins values whose channel axes differ")
    if is_in_place(node):
        return NotLiftable(f"{name} writes in place")
    rule = _RULES.get(name)
    if rule is None:
        return NotLiftable(f"{name} has no per-stream form here")
    if name not in POINTWISE and operands != [first_input(node)]:
        return NotLiftable(f"an argument of {name} is computed from the trunk")
    if name in POINTWISE and rank(node) != rank(operands[0]):
        return NotLiftable(f"{name} broadcasts the trunk to another rank")
    return rule.plan(node, dims[operands[0]])


def emit_lane(graph: Graph, node: Node, lanes: Lanes) -> Lane:
    """Insert the n-stream twin of ``node`` before it. `plan_lane` must have agreed."""
    operands = {arg: lanes[arg] for arg in node.all_input_nodes if arg in lanes}
    dim = plan_lane(node, {arg: lane.dim for arg, lane in operands.items()})
    assert not isinstance(dim, NotLiftable), f"{node} was planned as liftable: {dim}"
    operand = next(iter(operands.values()))
    new = node.prev
    with graph.inserting_before(node):
        twin = _RULES[op_name(node)].emit(graph, node, operands, operand)
    while (new := new.next) is not node:
        new.meta = meta_of_part(node)
    gates = {lane.gates for lane in operands.values()}
    assert len(gates) == 1, f"{node} joins streams of two sites"
    return Lane(twin, dim, operand.streams, gates.pop())


def keeps_tokens(node: Node, dims_of: Mapping[Node, int]) -> bool:
    """Whether what belongs to a token of its operands belongs to the same token of ``node``.

    Args:
        node: an operation that `plan_lane` agreed to.
        dims_of: channel axis of ``node`` and of each operand that has streams.
    """
    operand = next(arg for arg in node.all_input_nodes if arg in dims_of)
    if not is_tensor(node) or not is_tensor(operand):  # a norm with several results
        return True
    if op_name(node) in VIEWS:
        return False
    return _tokens(node, dims_of[node]) == _tokens(operand, dims_of[operand])


def _tokens(node: Node, dim: int) -> list[object]:
    sizes = list(dims(node))
    del sizes[dim]
    return sizes
