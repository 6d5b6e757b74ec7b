"""Add what a state gets from its other readers inside the backward of the pre that reads it.

    dX, ... = pre_backward(...);  dX + more   ->   pre_backward(..., more)

A state that a seam does not take in is read twice, by pre and by the post behind the branch, and
autograd adds the two gradients: 3 n rows of memory traffic, which the kernel of pre, holding its
own gradient in registers, does with n. Such states are the first of a trunk, those where a block of
recomputed sites starts, and all of a model with one site per graph.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.schedule import dependences, reorder, stable_order
from mhc_compile.passes.states import result_of
from mhc_compile.passes.values import OPERAND_VALUES, value_of

_PRE_BACKWARD = torch.ops.mhc.pre_backward.default
_ADD = torch.ops.aten.add.Tensor
_MORE = 9
"""Where a pre_backward takes what it adds; behind it, a single-pass one takes its gates."""


def accumulate_gradients_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Give every pre_backward the gradient that is added to its own, in place.

    Left alone: additions with a scale, of another shape or dtype, and those whose other operand
    cannot be computed first.

    Args:
        gm: a backward graph of AOTAutograd.
        example_inputs: ignored.
    """
    del example_inputs
    sums = list(_sums(gm))
    if not sums:
        return PassResult(gm, False)
    nodes = list(gm.graph.nodes)
    before = dependences(nodes)
    number = {node: at for at, node in enumerate(nodes)}
    taken = []
    for call, own, total in sums:
        more = next(operand for operand in total.all_input_nodes if operand is not own)
        later = number[more] > number[call]  # not as autograd orders it, and so rare
        if later and _comes_after(more, call, before, number):
            continue
        before[call].add(more)
        if later:
            nodes = stable_order(nodes, before)
            number = {node: at for at, node in enumerate(nodes)}
        call.args = (*call.args[:_MORE], more, *call.args[_MORE + 1 :])
        if OPERAND_VALUES in call.meta:
            values, named = call.meta[OPERAND_VALUES]
            values = (*values[:_MORE], value_of(more), *values[_MORE + 1 :])
            call.meta[OPERAND_VALUES] = (values, named)
        total.replace_all_uses_with(own)
        taken.append(total)
    reorder(gm.graph, nodes)
    for total in taken:
        gm.graph.erase_node(total)
    return PassResult(gm, bool(taken))


def _sums(gm: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Each pre_backward, its gradient of the state, and the sum which that goes into alone."""
    for call in gm.graph.find_nodes(op="call_function", target=_PRE_BACKWARD):
        own = next((part for part in call.users if result_of(part) == 0), None)
        has_more = call.args[_MORE : _MORE + 1] not in ((), (None,))
        if has_more or own is None or len(own.users) != 1:
            continue
        (total,) = own.users
        if total.target is not _ADD or total.kwargs or len(total.all_input_nodes) != 2:
            continue
        if _alike(*map(value_of, total.all_input_nodes)):
            yield call, own, total


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are tensors of one shape, whatever sizes are given, and one dtype."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    if one.dtype != other.dtype or one.dim() != other.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))


def _comes_after(
    node: Node, other: Node, before: Mapping[Node, Set[Node]], number: Mapping[Node, int]
) -> bool:
    """Whether ``node`` comes after ``other`` in every order; ``number`` is one of them."""
    waiting, seen = [node], {node}
    while waiting:
        reached = waiting.pop()
        if reached is other:
            return True
        near = {source for source in before[reached] if number[source] >= number[other]}
        waiting += near - seen
        seen |= near
    return False
