"""Replay recomputed sites by what was kept of them: no projection twice, one pass over the tokens.

    pre(X), seam(X, f, ...), seam(...)   ->   replay(X, [f, ...], [h_post, ...], ...)

The tags of `mhc_compile.passes.recompute` are on whole ops, so that a seam which is made again
makes its mappings again too, and these are its cost: the projection, and the Sinkhorn steps. Of
what a site has to keep they are little, 2 (n^2 + 2 n) numbers a token at most. Before AOTAutograd
cuts the graph of both directions in two, `keep_mappings_pass` marks them to be kept; afterwards
`replay_sites_pass` finds, in the backward, chains of sites of which only states and branch inputs
are wanted, and has ``mhc::replay`` make them.

Paper: arXiv 2512.24880, section 4.3.2.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.schedule import dependences, reorder, stable_order
from mhc_compile.passes.states import INPUT_AT, POST, PRE, SEAM, SEAM_NORM, result_of, spec_of
from mhc_compile.passes.values import RECOMPUTE, meta_of_part, value_of

_KEEP, _REPLAY = torch.ops.mhc.keep.default, torch.ops.mhc.replay.default
_EXITS = (POST, SEAM, SEAM_NORM)
_BACKWARD = {
    # Where a backward op has the arguments of its forward; what was saved comes behind them.
    torch.ops.mhc.pre_backward.default: (PRE, slice(3, 7)),
    torch.ops.mhc.seam_backward.default: (SEAM, slice(4, 11)),
}


def keep_mappings_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Mark the mappings of sites that the backward makes again to be kept, in place.

    The partitioner keeps no part of an op that it has to recompute, so mappings are copied and the
    copies are kept; `replay_sites_pass` takes them out again. Left alone: static sites and single
    passes, which no replay makes, and sites in regions of the user, where the branch itself is made
    again.

    Args:
        gm: a graph of AOTAutograd before its partitioner.
        example_inputs: ignored.
    """
    del example_inputs
    sites = [site for site in _sites(gm) if _is_ours(site)]
    for site in sites:
        _keep(gm, site)
    return PassResult(gm, bool(sites))


def replay_sites_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Take the copies of mappings out of a forward, and join the replayed sites of a backward.

    Left alone: sites whose mappings are read from the replayed op, and those whose branch output
    is itself computed from a state that is replayed with it.

    Args:
        gm: a forward or backward graph of AOTAutograd, or one without gradients.
        example_inputs: ignored.
    """
    del example_inputs
    modified = _take_out_copies(gm)
    replayed = dict(_replayed(gm))
    if not replayed:
        return PassResult(gm, modified)
    number = {node: at for at, node in enumerate(gm.graph.nodes)}
    while replayed:
        chain = _chain(replayed, number)
        for site in chain:
            del replayed[site.node]
        if _join(gm, chain, number):
            number = {node: at for at, node in enumerate(gm.graph.nodes)}
    return PassResult(gm, True)


def _sites(gm: GraphModule) -> Iterator[Node]:
    """Every site that a replay knows how to make."""
    for node in gm.graph.nodes:
        if node.target in INPUT_AT and spec_of(node).dynamic and not spec_of(node).single_pass:
            yield node


def _is_ours(site: Node) -> bool:
    """Whether a site is recomputed, and the branches before and behind it are not."""
    if not _is_recomputed(site):
        return False
    readers = [user for part in _mappings(site) for user in part.users]
    branches = [node.args[1] for node in (site, *readers) if node.target in _EXITS]
    return not any(isinstance(f, Node) and _is_recomputed(f) for f in branches)


def _is_recomputed(node: Node) -> bool:
    return node.meta.get(RECOMPUTE) == CheckpointPolicy.MUST_RECOMPUTE


def _mappings(site: Node) -> list[Node]:
    """h_post, h_res and what is saved of a site, as far as they are read."""
    return [part for part in site.users if part.users and result_of(part) > INPUT_AT[site.target]]


def _keep(gm: GraphModule, site: Node) -> None:
    """Have everything read copies of a site's mappings; the copies are tagged to be kept.

    They are results of one op: what the backward alone reads would not be kept by itself.
    """
    parts = _mappings(site)
    values = [value_of(part) for part in parts]
    behind = site

    def add(target: Any, args: Any, name: str, value: Any) -> Node:
        nonlocal behind
        with gm.graph.inserting_after(behind):
            behind = gm.graph.create_node("call_function", target, args, name=name)
        behind.meta = {"val": value}
        return behind

    sources = [
        add(operator.getitem, (site, result_of(part)), part.name, value)
        for part, value in zip(parts, values, strict=True)
    ]
    copies = add(_KEEP, (sources,), f"{site.name}_keep", values)
    copies.meta[RECOMPUTE] = CheckpointPolicy.MUST_SAVE
    for at, (part, value) in enumerate(zip(parts, values, strict=True)):
        part.replace_all_uses_with(add(operator.getitem, (copies, at), f"{part.name}_kept", value))
        gm.graph.erase_node(part)


def _take_out_copies(gm: GraphModule) -> bool:
    found = gm.graph.find_nodes(op="call_function", target=_KEEP)
    for copies in found:
        (parts,) = copies.args
        for copy in list(copies.users):
            copy.replace_all_uses_with(parts[result_of(copy)])
            gm.graph.erase_node(copy)
        gm.graph.erase_node(copies)
    return bool(found)


@dataclass(frozen=True, slots=True)
class _Site:
    """A site that is replayed."""

    node: Node
    """Its pre, or the seam that enters it."""
    saved: Node
    """What the forward kept of it."""

    @property
    def given(self) -> list[Node]:
        """All that it is made of but the state."""
        return [node for node in self.node.all_input_nodes if node is not self.node.args[0]] + [
            self.saved
        ]


def _replayed(gm: GraphModule) -> Iterator[tuple[Node, _Site]]:
    """The sites of a backward whose mappings have all been kept, in order."""
    saved: dict[Any, Any] = {}
    for node in gm.graph.nodes:
        if node.target in _BACKWARD:
            target, arguments = _BACKWARD[node.target]
            saved[target, node.args[arguments]] = node.args[arguments.stop]
    for node in _sites(gm):
        kept = saved.get((node.target, node.args[:-1]))
        if kept is None:
            continue
        read = [part for part in node.users if part.users]
        if all(0 <= result_of(part) <= INPUT_AT[node.target] for part in read):
            yield node, _Site(node, kept)


def _chain(replayed: Mapping[Node, _Site], number: Mapping[Node, int]) -> list[_Site]:
    """The first site that is left, and others that one replay can make with it."""
    chain = [next(iter(replayed.values()))]
    while (behind := _behind(chain[-1].node, replayed)) is not None:
        if _depends(behind.given, {site.node for site in chain}, number):
            break
        chain.append(behind)
    state, last = chain[0].node.args[0], chain[-1].node
    if chain[0].node.target is SEAM:
        # The read of the state before them, which a backward wants last.
        for site in replayed.values():
            is_read = site.node.target is PRE and site.node.args[0] is state
            if is_read and all(number[node] < number[last] for node in site.given):
                return [site, *chain] if site.node.args[-1] == last.args[-1] else chain
    return chain


def _behind(node: Node, replayed: Mapping[Node, _Site]) -> _Site | None:
    """The site that carries on the state which a site leaves, or which its pre reads."""
    made = [part for part in node.users if result_of(part) == 0]
    for state in node.all_input_nodes[:1] if node.target is PRE else made:
        for user in state.users:
            if user in replayed and user.target is SEAM and user.args[0] is state:
                return replayed[user] if user.args[-1] == node.args[-1] else None
    return None


def _depends(nodes: list[Node], on: set[Node], number: Mapping[Node, int]) -> bool:
    """Whether any of ``nodes`` is computed from one of ``on``."""
    first = min(number[node] for node in on)
    waiting, seen = list(nodes), set(nodes)
    while waiting:
        node = waiting.pop()
        if node in on:
            return True
        near = {source for source in node.all_input_nodes if number[source] >= first}
        waiting += near - seen
        seen |= near
    return False


def _join(gm: GraphModule, chain: Sequence[_Site], number: dict[Node, int]) -> bool:
    """Put one op in the place of a chain; returns whether nodes had to move for it."""
    graph, first, last = gm.graph, chain[0].node, chain[-1].node
    seams = [site.node for site in chain if site.node.target is SEAM]
    arguments = (
        first.args[0],
        *([seam.args[position] for seam in seams] for position in (1, 2, 3)),
        [site.saved for site in chain],
        *([site.node.args[position] for site in chain] for position in (-3, -2)),
        first.args[-1],
    )
    results = [(site.node, at) for site in chain for at in range(INPUT_AT[site.node.target] + 1)]

    def add(target: Any, args: Any, like: Node, value: Any) -> Node:
        node = graph.create_node("call_function", target, args, name=f"{like.name}_replay")
        node.meta = {**meta_of_part(like), "val": value}
        number[node] = number[last]
        return node

    with graph.inserting_before(last):
        replay = add(_REPLAY, arguments, first, [value_of(op)[at] for op, at in results])
        for place, (op, at) in enumerate(results):
            for part in [part for part in op.users if result_of(part) == at]:
                taken = add(operator.getitem, (replay, place), part, value_of(part))
                part.replace_all_uses_with(taken)
    for site in reversed(chain):
        for part in list(site.node.users):
            graph.erase_node(part)
        graph.erase_node(site.node)
    users = (user for taken in replay.users for user in taken.users)
    if all(number[user] >= number[last] for user in users):
        return False
    nodes = list(graph.nodes)
    return reorder(graph, stable_order(nodes, dependences(nodes)))
