"""Split a site whose branch ends in a collective, so that a part of it can run meanwhile.

    u, h_post, h_res = pre(X, phi, bias, alpha)
        ->   u = premix(X, phi_pre, bias_pre, alpha_pre);  _, h_post, h_res = pre(X, ...)

The branch needs u alone, and for that the n columns of phi that make H_pre. The mappings of the
post-mix (the other n^2 + n columns, and the Sinkhorn steps) are wanted when the branch is done, and
wait for nothing: the overlap pass can put them behind the start of a collective of the branch. The
pre-mix is ``mhc::collapse`` in its learned form, which is the same equation. A seam becomes its
post-mix and the two; that can come apart as well, see `mhc_compile.passes.split_post`.

What is paid for it is that X is read twice, by more kernels; the estimate decides site by site.
Where kernels are bound by bytes, it is not worth it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.passes.collectives import is_wait, waits_of_starts
from mhc_compile.passes.draft import Draft
from mhc_compile.passes.estimate import Device, device_of, node_seconds, transfer_seconds
from mhc_compile.passes.split_backward import split_backwards
from mhc_compile.passes.split_post import split_posts
from mhc_compile.passes.states import (
    COLLAPSE,
    INPUT_AT,
    POST,
    PRE,
    SEAM,
    SEAM_NORM,
    result_of,
    spec_of,
)
from mhc_compile.passes.values import value_of

_ATEN = torch.ops.aten


def split_sites_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, device: Device | None = None
) -> PassResult:
    """Split every site of a lowered graph that gains by it, in place.

    Left alone: static sites, which have nothing to compute; constraints with gates or norms of
    their own; single passes, whose point is to read the streams once; sites without a collective
    between u and the post-mix.

    Args:
        gm: a functional graph of ATen operations, as AOTAutograd makes it.
        example_inputs: ignored.
        device: what the estimate is for; None takes the graph's.
    """
    del example_inputs
    starts = waits_of_starts(gm.graph)
    if not starts:
        return PassResult(gm, False)
    device = device or device_of(gm.graph)
    start_of = {wait: start for start, waits in starts.items() for wait in waits}
    index = {node: number for number, node in enumerate(gm.graph.nodes)}
    modified = False
    for node in list(gm.graph.nodes):
        if node.target not in (PRE, SEAM) or not _has_halves(node):
            continue
        pending = sum(transfer_seconds(start, device) for start in _pending(node, start_of, index))
        if pending:
            modified |= _split(node, pending, device)
    modified |= split_posts(gm.graph, starts, device)
    modified |= split_backwards(gm.graph, starts, device)
    return PassResult(gm, modified)


def _has_halves(node: Node) -> bool:
    """Whether the pre-mix of a site is a learned collapse, and anything reads its result."""
    spec = spec_of(node)
    constraint = constraint_of(spec)
    same = spec.dynamic and constraint.gate == "sigmoid" and not constraint.per_stream
    same = same and not spec.single_pass
    return same and bool(_parts(node, INPUT_AT[node.target]))


def _parts(node: Node, position: int) -> list[Node]:
    return [part for part in node.users if result_of(part) == position]


def _pending(
    site: Node, start_of: Mapping[Node, Node], index: Mapping[Node, int]
) -> dict[Node, None]:
    """Collectives that the branch waits for on its way from u to the post-mix of the site."""
    branch: set[Node] = set()
    todo = [
        reader.args[1]
        for part in _parts(site, INPUT_AT[site.target] + 1)
        for reader in part.users
        if reader.target in (POST, SEAM, SEAM_NORM) and reader.args[2] is part
    ]
    while todo:
        node = todo.pop()
        assert isinstance(node, Node)
        if node not in branch and index.get(node, -1) > index[site]:
            branch.add(node)
            todo += node.all_input_nodes
    reached = set(_parts(site, INPUT_AT[site.target]))
    found: dict[Node, None] = {}
    for node in sorted(branch, key=index.__getitem__):
        if reached.intersection(node.all_input_nodes):
            reached.add(node)
            if is_wait(node) and node in start_of:
                found[start_of[node]] = None
    return found


def _split(site: Node, pending: float, device: Device) -> bool:
    """Put the halves of a site in its place if that is worth it."""
    draft, results = _halves(site)
    whole, costs = node_seconds(site, device), draft.seconds(device)
    total, mappings = sum(costs), costs[-1]
    # Until the branch has its input, plus what of the mappings the collective is too short for.
    if total - mappings + max(0.0, mappings - pending) >= whole:
        return False
    state, u, mapped = draft.place(*results)
    first = INPUT_AT[site.target]
    for part in list(site.users):
        position = result_of(part)
        if position > first:
            part.args = (mapped, position - first)
        else:
            part.replace_all_uses_with(u if position == first else state)
            site.graph.erase_node(part)
    site.graph.erase_node(site)
    return True


def _halves(site: Node) -> tuple[Draft, tuple[Node, Node, Node]]:
    """The operations, of which the last can wait; the state, u and what pre gives."""
    draft = Draft(site)
    *state_args, phi, bias, alpha, spec = draft.operands()
    n, values, first = spec_of(site).streams, value_of(site), INPUT_AT[site.target]
    state = state_args[0]
    if site.target is SEAM:
        state = draft.call("_post", values[0], POST, *state_args, spec)
    with value_of(phi).fake_mode:
        columns = value_of(phi)[:, :n]
        parts = columns.contiguous(), value_of(bias)[:n], value_of(alpha)[:1]
    own = (
        draft.call(
            "_phi",
            parts[0],
            _ATEN.clone.default,
            draft.call("_columns", columns, _ATEN.slice.Tensor, phi, 1, 0, n),
            memory_format=torch.contiguous_format,
        ),
        draft.call("_bias", parts[1], _ATEN.slice.Tensor, bias, 0, 0, n),
        draft.call("_alpha", parts[2], _ATEN.slice.Tensor, alpha, 0, 0, 1),
    )
    u = draft.call("_premix", values[first], COLLAPSE, state, *own, "learned", spec)
    mapped = draft.call("_mappings", values[first:], PRE, state, phi, bias, alpha, spec)
    return draft, (state, u, mapped)
