"""Split a backward op whose branch ends in a collective, so that a part of it can run meanwhile.

    dX, df, ..., dphi, ... = seam_backward(...)
        ->   dX, df, ..., dz, ... = seam_backward_dz(...);   dphi = phi_backward(dz, X, f, ...)

Going back, a branch waits for df and asks for du in a collective; what the rest of a trunk waits
for is du. The gradient of phi is wanted by nothing but the optimizer. Where post is not in a seam,
all that the branch waits for is df, a small part of post_backward:

    dX, df, ... = post_backward(dX', X, f, ...)
        ->   df = post_backward_branch(dX', ...);   dX, ... = post_backward_state(dX', X, f, ...)

The overlap pass puts the second op behind the start of the collective. The estimate decides op by
op whether a branch has its gradient earlier by it. What else runs in the window comes first there,
the gradients of the branch's own weights: where they fill it, ops stay whole. So do those of single
passes that read du.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from mhc_compile.kernels.layout import dz_width
from mhc_compile.passes.collectives import is_wait
from mhc_compile.passes.draft import Draft
from mhc_compile.passes.estimate import Device, node_seconds, transfer_seconds
from mhc_compile.passes.states import result_of, spec_of
from mhc_compile.passes.values import value_of

_OPS = torch.ops.mhc
_PRE, _SEAM, _POST = (
    _OPS.pre_backward.default,
    _OPS.seam_backward.default,
    _OPS.post_backward.default,
)
_DPHI: dict[Any, int] = {_PRE: 1, _SEAM: 4}
"""Which result is the gradient of phi, of ops that read du."""
_DF = 1
"""Which result of post_backward is that of the branch output."""
_BUT_PHI: dict[Any, OpOverload] = {
    _PRE: _OPS.pre_backward_dz.default,
    _SEAM: _OPS.seam_backward_dz.default,
}


def split_backwards(graph: Graph, starts: Mapping[Node, Sequence[Node]], device: Device) -> bool:
    """Split every backward op of a graph that gains by it, in place; tells whether any did.

    Args:
        graph: a functional graph of ATen operations, as AOTAutograd makes it.
        starts: its collectives with their waits.
        device: what the estimate is for.
    """
    nodes = list(graph.nodes)
    taken = dict.fromkeys(starts, 0.0)  # seconds of the windows that are filled already
    modified = False
    for number, node in enumerate(nodes):
        early, late = _parts(node)
        if not early or not late:
            continue
        found, others = _window(islice(nodes, number + 1, None), early, late, starts, device)
        if not found:
            continue
        room = sum(transfer_seconds(start, device) - taken[start] for start in found) - others
        draft, results = _but_phi(node) if node.target in _DPHI else _branch_first(node)
        first, *_, rest = draft.seconds(device)
        whole = node_seconds(node, device)
        if node.target in _DPHI and device.phi_apart:
            whole = first + rest
        # Until the branch has its gradient, plus what of the rest the collective is too short for.
        exposed = first + max(0.0, rest - max(0.0, room))
        if exposed + device.op_launch >= whole:  # the estimate is no finer than that
            continue
        _replace(node, *draft.place(*results))
        taken[next(iter(found))] += rest
        modified = True
    return modified


def _parts(node: Node) -> tuple[list[Node], list[Node]]:
    """The results of a backward op that a branch waits for, and those that can come later."""
    if node.target is _POST:
        return _taken(node, [_DF]), _taken(node, [0, 2, 3])
    if node.target in _DPHI and spec_of(node).dynamic and not spec_of(node).single_pass:
        dphi = _taken(node, [_DPHI[node.target]])
        return [part for part in node.users if part not in dphi], dphi
    return [], []


def _taken(node: Node, positions: Sequence[int]) -> list[Node]:
    return [part for part in node.users if part.args[1] in positions]


def _window(
    behind: Iterable[Node],
    early: Sequence[Node],
    late: Sequence[Node],
    starts: Mapping[Node, Sequence[Node]],
    device: Device,
) -> tuple[list[Node], float]:
    """The first collectives that ``early`` leads to, and seconds of what else of it runs then.

    Args:
        behind: what comes after the op, in order.
        early: results that the branch waits for.
        late: the others.
        starts: collectives with their waits.
        device: what the estimate is for.
    """
    reached, waiting = set(early), set(late)
    order: list[Node] = []
    found: list[Node] = []
    for node in behind:
        sources = node.all_input_nodes
        if not waiting.isdisjoint(sources) or (is_wait(node) and not reached.isdisjoint(sources)):
            waiting.add(node)
        elif not reached.isdisjoint(sources):
            reached.add(node)
            order.append(node)
            if node in starts:
                found.append(node)
        else:
            continue
        if node.target in _DPHI:  # the next op that reads a du
            break
    leads, others = set(found), 0.0
    for node in reversed(order):
        if node in leads:
            leads.update(node.all_input_nodes)
        else:
            others += node_seconds(node, device)
    return found, others


def _but_phi(site: Node) -> tuple[Draft, tuple[Node, Node]]:
    """A pre_backward or seam_backward without the gradient of phi, and that."""
    draft, seam = Draft(site), site.target is _SEAM
    operands, values = draft.operands(), list(value_of(site))
    values = values if seam else values[:4]  # the gradient of gates is for single passes
    X, phi, saved, spec = (operands[at] for at in ((4, 8, 11, 12) if seam else (3, 4, 7, 8)))
    before = operands[5:8] if seam else [None] * 3
    tokens = value_of(saved)
    with tokens.fake_mode:
        width = dz_width(tokens.shape[-1], spec_of(site).streams)
        dz = tokens.new_empty((*tokens.shape[:-1], width))
    at = _DPHI[site.target]
    dphi, values[at] = values[at], dz
    first = draft.call("_dz", tuple(values), _BUT_PHI[site.target], *operands)
    taken = draft.call("_of_dz", dz, getitem, first, at)
    rest = draft.call("_phi", dphi, _OPS.phi_backward.default, taken, X, *before, phi, spec)
    return draft, (first, rest)


def _branch_first(site: Node) -> tuple[Draft, tuple[Node, Node]]:
    """The gradient of a branch output, and what else a post_backward gives."""
    draft = Draft(site)
    operands, (dX, df, *mappings) = draft.operands(), value_of(site)
    dY, _, f, h_post, _, spec = operands
    given = (dY, h_post, value_of(f).dtype, spec)
    first = draft.call("_branch", df, _OPS.post_backward_branch.default, *given)
    values = (dX, *mappings)
    rest = draft.call("_state", values, _OPS.post_backward_state.default, *operands)
    return draft, (first, rest)


def _replace(site: Node, first: Node, rest: Node) -> None:
    """Take every result of the site from its two parts instead."""
    for part in list(site.users):
        position = result_of(part)
        if site.target is _POST and position != _DF:
            part.args = (rest, position - (position > _DF))
        elif site.target is not _POST and position != _DPHI[site.target]:
            part.args = (first, position)
        else:
            part.replace_all_uses_with(first if site.target is _POST else rest)
            site.graph.erase_node(part)
    site.graph.erase_node(site)
