"""Which nodes of a rewritten graph carry the n-stream state, and of which trunk."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from mhc_compile.kernels.spec import SiteSpec

EXPAND, PRE, POST = (
    torch.ops.mhc.expand.default,
    torch.ops.mhc.pre.default,
    torch.ops.mhc.post.default,
)
SEAM, COLLAPSE, READ = (
    torch.ops.mhc.seam.default,
    torch.ops.mhc.collapse.default,
    torch.ops.mhc.read.default,
)
SEAM_NORM = torch.ops.mhc.seam_norm.default

INPUT_AT: dict[Any, int] = {PRE: 0, SEAM: 1}
"""Which result of an op is the branch input; the mappings come behind it, the state before."""


def result_of(part: Node) -> int:
    """Which result of its op a node takes; -1 for anything else that reads the op."""
    if part.target is not operator.getitem:
        return -1
    number = part.args[1]
    assert isinstance(number, int), "a result is taken by number"
    return number


def spec_of(node: Node) -> SiteSpec:
    """The specification an mhc op (other than expand) was given: its last text."""
    return SiteSpec.decode([arg for arg in node.args if isinstance(arg, str)][-1])


def trunk_of_states(graph: Graph) -> dict[Node, int]:
    """The trunk of every node that carries a state, in the order of the graph.

    A state comes from an expand, or from outside of the graph; it goes through post, seam and the
    operations that a trunk has between its sites. A seam itself counts, its mappings do not.
    """
    trunk_of: dict[Node, int] = {}
    for node in graph.nodes:
        if node.target is EXPAND:
            trunk_of[node] = len(set(trunk_of.values()))
        elif node.target in (PRE, POST, SEAM, SEAM_NORM, COLLAPSE, READ):
            state = node.args[0]
            if state not in trunk_of:  # it comes from another graph
                trunk_of[state] = len(set(trunk_of.values()))
            if node.target in (POST, SEAM, SEAM_NORM):
                trunk_of[node] = trunk_of[state]
        elif not _is_mapping(node):
            carried = [trunk_of[source] for source in node.all_input_nodes if source in trunk_of]
            if carried:
                trunk_of[node] = carried[0]
    return trunk_of


def _is_mapping(node: Node) -> bool:
    """Whether the node takes something else than the state out of a seam."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.target in (SEAM, SEAM_NORM) and node.args[1:] != (0,)
