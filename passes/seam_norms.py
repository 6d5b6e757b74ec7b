"""Have seams apply the norm with which the next branch starts.

    X', u, ... = seam(X, f, ...);  y = norm(u, weight, shift)
        ->   X', y, ... = seam_norm(X, f, ..., weight, shift)

u is then never in memory. On by ``MHCConfig(seam_norm=True)``.
"""

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.branch_norms import BranchNorm, find_branch_norm
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.states import EXPAND, INPUT_AT, POST, SEAM, SEAM_NORM, result_of, spec_of
from mhc_compile.passes.values import RECOMPUTE, REGION, describe, dtype_of, meta_of_part
from mhc_compile.passes.vocabulary import CAST, SHAPE_ONLY

_LOG = logging.getLogger(__name__)
_OF_PARAMETERS = CAST | {"add"}
"""Operations that make a weight out of a parameter (``1 + weight``), and may move up."""


def join_norms_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Join every seam with the norm that alone reads its branch input, in place.

    Left alone, with the reason in the log: branches that start with something else; norms that
    compute in half precision, or whose result has another dtype than the streams; sites that a
    backward makes again, which a replay does without their projections but with u; static sites
    and single passes.
    """
    del example_inputs
    order = {node: float(number) for number, node in enumerate(gm.graph.nodes)}
    modified = False
    for seam in gm.graph.find_nodes(op="call_function", target=SEAM):
        found = _norm_of(seam, order)
        if isinstance(found, str):
            _LOG.info("no norm for the seam %s: %s", describe(seam), found)
            continue
        _join(gm.graph, seam, found, order)
        modified = True
    return PassResult(gm, modified)


def _norm_of(seam: Node, order: Mapping[Node, float]) -> BranchNorm | str:
    spec = spec_of(seam)
    if spec.single_pass or not spec.dynamic:
        return "single passes and static sites leave u as it is"
    if spec.dim != -1:
        return "its channels are not on the last axis"
    if RECOMPUTE in seam.meta:
        return "it is made again in the backward"
    dtype = _dtype_of_state(seam)
    inputs = [part for part in seam.users if result_of(part) == INPUT_AT[SEAM]]
    if len(inputs) != 1 or dtype is None:
        return "nothing reads its branch input" if dtype else "the dtype of its state is not known"
    readers = [user for user in inputs[0].users if op_name(user) not in SHAPE_ONLY]
    found = find_branch_norm(readers, inputs[0], dtype)
    if isinstance(found, str):
        return found
    if any(
        node.meta.get(k) != seam.meta.get(k) for node in found.nodes for k in (RECOMPUTE, REGION)
    ):
        return "its norm is in another checkpointed region"
    for vector in (found.weight, found.shift):
        if vector is not None and _behind(vector, seam, order) is None:
            return f"{describe(vector)} is computed behind it"
    return found


def _dtype_of_state(node: Node) -> torch.dtype | None:
    """The dtype of the streams, which rewritten graphs tell where a trunk starts or is cast."""
    while True:
        known = dtype_of(node)
        if known is not None:
            return known
        if node.target is operator.getitem or node.target in (EXPAND, POST, SEAM, SEAM_NORM):
            source = node.args[0]
        elif op_name(node) in CAST:
            return next((arg for arg in node.args if isinstance(arg, torch.dtype)), None)
        else:
            source = next(iter(node.all_input_nodes), None)
        if not isinstance(source, Node):
            return None
        node = source


def _behind(vector: Node, seam: Node, order: Mapping[Node, float]) -> list[Node] | None:
    """The nodes that make ``vector`` and stand behind the seam, in order; None if one has to."""
    if order[vector] < order[seam]:
        return []
    if vector.op != "get_attr" and op_name(vector) not in _OF_PARAMETERS:
        return None
    found: list[Node] = []
    for source in vector.all_input_nodes:
        above = _behind(source, seam, order)
        if above is None:
            return None
        found += [node for node in above if node not in found]
    return [*found, vector]


def _join(graph: Graph, seam: Node, norm: BranchNorm, order: dict[Node, float]) -> None:
    for vector in (norm.weight, norm.shift):
        for node in _behind(vector, seam, order) or () if vector is not None else ():
            seam.prepend(node)
            order[node] = order[seam] - 0.5
    *arguments, _ = seam.args
    spec = replace(
        spec_of(seam), branch_norm=norm.kind, branch_eps=norm.eps, branch_rounds=norm.rounds
    )
    with graph.inserting_after(seam):
        joined = graph.create_node(
            "call_function",
            SEAM_NORM,
            (*arguments, norm.weight, norm.shift, spec.encode()),
            name=f"{seam.name}_norm",
        )
    joined.meta = meta_of_part(seam)
    for part in list(seam.users):
        part.args = (joined, part.args[1])
        if result_of(part) == INPUT_AT[SEAM]:
            norm.nodes[-1].replace_all_uses_with(part)
    for node in reversed(norm.nodes):
        graph.erase_node(node)
    graph.erase_node(seam)
