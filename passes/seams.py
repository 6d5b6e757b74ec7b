"""Join neighbouring sites: the post of one and the pre of the next become one ``mhc::seam``.

    X' = post(X, f, h_post, h_res);  u, h_post', h_res' = pre(X', ...)   ->   one op, X' included

The seam reads the state once and writes it once, and sums the gradients of X' inside, where the two
ops leave three additions of n rows to autograd.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.states import POST, PRE, SEAM, result_of, spec_of
from mhc_compile.passes.values import RECOMPUTE, REGION, meta_of_part


def join_seams_pass(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
    """Join every post with the pre that reads its state, in place.

    Left alone: sites whose specifications differ, those in different checkpointed regions, a pre
    whose parameters are computed after something else reads the state, and a single-pass pre that
    does not read by the weights of the site before.
    """
    del example_inputs
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    pairs = list(_pairs(gm, order))
    for post, pre, behind in pairs:
        _join(gm, post, pre, behind)
    return PassResult(gm, bool(pairs))


def _pairs(gm: GraphModule, order: Mapping[Node, int]) -> Iterator[tuple[Node, Node, Node]]:
    """A post, the pre that goes with it, and the node behind which their seam can stand."""
    for post in gm.graph.find_nodes(op="call_function", target=POST):
        for pre in post.users:
            if pre.target is not PRE or pre.args[0] is not post or pre.args[4] != post.args[4]:
                continue
            if pre.args[5:] != ((post.args[2],) if spec_of(post).single_pass else ()):
                continue
            if any(pre.meta.get(key) != post.meta.get(key) for key in (RECOMPUTE, REGION)):
                continue
            behind = max(
                (post, *(n for n in pre.all_input_nodes if n is not post)), key=order.__getitem__
            )
            if all(order[user] > order[behind] for user in post.users):
                yield post, pre, behind
                break


def _join(gm: GraphModule, post: Node, pre: Node, behind: Node) -> None:
    graph, (*state, spec), parameters = gm.graph, post.args, pre.args[1:4]
    with graph.inserting_after(behind):
        arguments = (*state, *parameters, spec)
        seam = graph.create_node("call_function", SEAM, arguments, name=f"{post.name}_seam")
    with graph.inserting_after(seam):
        state_after = graph.create_node(
            "call_function", operator.getitem, (seam, 0), name=f"{post.name}_next"
        )
    for node in (seam, state_after):
        node.meta = meta_of_part(post)
    for part in list(pre.users):
        part.args = (seam, result_of(part) + 1)
    graph.erase_node(pre)
    post.replace_all_uses_with(state_after)
    graph.erase_node(post)
