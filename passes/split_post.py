"""Split a post-mix whose branch ends in a collective, so that a part of it can run meanwhile.

    X' = post(X, f, h_post, h_res)   ->   M = mix(X, h_res);   X' = post(M, f, h_post, I)

M = H_res X waits for no branch output, and the overlap pass puts it behind the start of the
collective. What is left is the post of a constraint that does not mix, on the same numbers.

M is written and read for it, so that what is left moves the bytes of the whole post, and gains only
where the products with H_res take longer than those: the more streams, the more of them. The
estimate decides post by post. Streams narrower than float32 stay whole: they would be rounded once
more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import coefficient_dtype
from mhc_compile.passes.draft import Draft
from mhc_compile.passes.estimate import Device, node_seconds, transfer_seconds
from mhc_compile.passes.states import POST, result_of, spec_of
from mhc_compile.passes.values import value_of

_MIX = torch.ops.mhc.mix.default


def split_posts(graph: Graph, starts: Mapping[Node, Sequence[Node]], device: Device) -> bool:
    """Split every post of a graph that gains by it, in place; tells whether any did.

    Args:
        graph: a functional graph of ATen operations, as AOTAutograd makes it.
        starts: its collectives with their waits.
        device: what the estimate is for.
    """
    start_of = {wait: start for start, waits in starts.items() for wait in waits}
    index = _numbered(graph)
    modified = False
    for post in graph.find_nodes(op="call_function", target=POST):
        if not _keeps_bits(post):
            continue
        found, others = _window(post, start_of, index, device)
        if not found:
            continue
        room = sum(transfer_seconds(start, device) for start in found) - others
        draft, result = _mixed_first(post)
        *before, rest = draft.seconds(device)
        # Behind the branch, plus what of the mixing the collective is too short for.
        exposed = rest + max(0.0, sum(before) - max(0.0, room))
        if exposed + device.op_launch >= node_seconds(post, device):
            continue  # the estimate is no finer than that
        post.replace_all_uses_with(*draft.place(result))
        graph.erase_node(post)
        index = _numbered(graph)
        modified = True
    return modified


def _numbered(graph: Graph) -> dict[Node, int]:
    return {node: number for number, node in enumerate(graph.nodes)}


def _keeps_bits(post: Node) -> bool:
    """Whether there is a mixing to take off, and its result is not rounded on the way.

    The two products of one stream are added in one step, with a single rounding.
    """
    spec, X = spec_of(post), value_of(post.all_input_nodes[0])
    mixes = constraint_of(spec).mixes and spec.streams > 1
    return mixes and X.dtype == coefficient_dtype(X)


def _window(
    post: Node, start_of: Mapping[Node, Node], index: Mapping[Node, int], device: Device
) -> tuple[list[Node], float]:
    """The collectives between the state and the branch output, and seconds of what else runs then.

    Args:
        post: reads the two.
        start_of: what every wait waits for.
        index: where nodes stand.
        device: what the estimate is for.
    """
    X, f, *mappings = post.all_input_nodes
    state = X.all_input_nodes[0] if result_of(X) == 0 else X
    own = _upstream([X, *mappings], state, index)
    branch = _upstream([f], state, index) - own
    reached = {state, X}
    found: list[Node] = []
    for node in sorted(branch | own, key=index.__getitem__):
        if reached.isdisjoint(node.all_input_nodes):
            continue
        reached.add(node)
        if node in branch and node in start_of:
            found.append(start_of[node])
    others = own - _upstream(found, state, index)
    return found, sum(node_seconds(node, device) for node in others)


def _upstream(nodes: Iterable[Node], state: Node, index: Mapping[Node, int]) -> set[Node]:
    """``nodes`` and all that they are made of behind ``state``."""
    found, todo = set[Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and index[node] > index[state]:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _mixed_first(post: Node) -> tuple[Draft, Node]:
    """H_res X, an identity that nothing reads, and the rest of a post."""
    draft, spec = Draft(post), spec_of(post)
    (X, f, h_post, h_res, text), out = draft.operands(), value_of(post)
    with out.fake_mode:
        eye = torch.eye(spec.streams, device=out.device)
    mixed = draft.call("_mixed", out, _MIX, X, h_res, text)
    none = draft.call("_identity", eye, torch.ops.aten.eye.default, spec.streams, device=out.device)
    still = replace(spec, constraint="identity").encode()
    return draft, draft.call("_rest", out, POST, mixed, f, h_post, none, still)
