"""Tag the work of the streams for recomputation in the backward, in blocks of sites.

Kept are the branch outputs, and the state where a block starts; everything else of a trunk (later
states, branch inputs, mappings) is made again in the backward, block by block, and no branch ever
runs twice. The tags are those of ``torch.utils.checkpoint``: AOTAutograd's partitioner obeys them.

Paper: arXiv 2512.24880, section 4.3.2, equation (20).
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.states import EXPAND, POST, PRE, spec_of, trunk_of_states
from mhc_compile.passes.values import RECOMPUTE, REGION

_Block = tuple[int, int]  # which run of sites, which block of it


def block_length(sites: int, streams: int) -> int:
    """Sites per block that keep the least: equation (20), the smaller on ties.

    ``argmin over r of  n C ceil(L / r) + (n + 2) C r``: the states where blocks start, and what one
    block holds while it is replayed. C cancels.

    Args:
        sites: L, at least 1.
        streams: n.
    """
    return min(range(1, sites + 1), key=lambda r: (streams * -(-sites // r) + (streams + 2) * r, r))


def tag_recompute_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, length: int | None = None
) -> PassResult:
    """Tag the mhc ops of every trunk in blocks of ``length`` sites, in place.

    Sites inside a checkpointed region of the user keep that region's tags; the sites between two
    such regions make blocks of their own.

    Args:
        gm: a widened graph, before its seams are joined: a block boundary lies between a post and
            the next pre.
        example_inputs: ignored.
        length: sites per block; None takes `block_length` of each run of sites.
    """
    del example_inputs
    trunk_of = trunk_of_states(gm.graph)
    block_of: dict[Node, _Block] = {}
    for number, run in enumerate(_runs(gm, trunk_of)):
        size = length or block_length(len(run), spec_of(run[0]).streams)
        block_of |= {pre: (number, step // size) for step, pre in enumerate(run)}
    if not block_of:
        return PassResult(gm, False)
    _spread(gm, trunk_of, block_of)
    for node in block_of:
        node.meta[RECOMPUTE] = CheckpointPolicy.MUST_RECOMPUTE
    _number(gm, block_of)
    return PassResult(gm, True)


def _runs(gm: GraphModule, trunk_of: Mapping[Node, int]) -> Iterator[list[Node]]:
    """The pre of every site, by trunk; cut where sites are in regions of the user.

    A site alone is no run: its only state is that of its entry.
    """
    trunks: dict[int, list[list[Node]]] = {}
    for pre in gm.graph.find_nodes(op="call_function", target=PRE):
        runs = trunks.setdefault(trunk_of[pre.args[0]], [[]])
        if RECOMPUTE in pre.meta:
            runs.append([])
        else:
            runs[-1].append(pre)
    for runs in trunks.values():
        yield from (run for run in runs if len(run) > 1)


def _spread(gm: GraphModule, trunk_of: Mapping[Node, int], block_of: dict[Node, _Block]) -> None:
    """From the pre of a site to its mappings, its post, and the states up to the next site."""
    entries = []
    for node in gm.graph.nodes:
        if node.op == "placeholder" or RECOMPUTE in node.meta:
            continue
        if node.target is EXPAND:
            entries.append(node)
            continue
        if node.target is operator.getitem and node.args[0].target is PRE:
            source = node.args[0]
        elif node.target is POST:
            source = node.args[2]  # h_post, of the same site
        elif node in trunk_of and node not in block_of:
            source = next(n for n in node.all_input_nodes if n in trunk_of)
        else:
            continue
        if source in block_of:
            block_of[node] = block_of[source]
    for entry in entries:
        first = next((block_of[n] for n in entry.users if n.target is PRE and n in block_of), None)
        if first is not None:
            block_of[entry] = first


def _number(gm: GraphModule, block_of: Mapping[Node, _Block]) -> None:
    """Number the blocks and the user's regions in the order of the graph.

    The partitioner keeps a value that leaves a region for one with a higher number: the state
    where a block starts.
    """
    numbers: dict[Any, int] = {}
    for node in gm.graph.nodes:
        region = block_of.get(node, node.meta.get(REGION))
        if region is not None:
            node.meta[REGION] = numbers.setdefault(region, len(numbers))
