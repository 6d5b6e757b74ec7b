"""What a graph break hides: that one input of a graph was computed from another one before.

    h = f(x)   # breaks: f runs in graphs of its own, or in Python
    y = x + h  # a graph with two inputs, in which nothing tells that h comes from x

Somebody who saw the run can tell (`Ask`), and is asked about sums that are no residuals without the
answer.
"""

from collections.abc import Callable, Iterable

from torch.fx import Node

from mhc_compile.passes.flow import FlowIndex, Outside
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import dims, is_float_tensor, is_state
from mhc_compile.passes.walks import plain_walk

Ask = Callable[[SumTree, int, Node, Node], int | None]
"""(sum, position of the leaf that may be its skip, input below another leaf, input that the skip
copies) -> what lies on the way from the second input to the first: an or of MIXES and BENDS, or
None if there is no way."""


def outside_ways(index: FlowIndex, trees: Iterable[SumTree], ask: Ask) -> Outside:
    """What ``ask`` knows of the inputs that meet in ``trees``."""
    inputs = [n for n in index.nodes if n.op == "placeholder" and _is_value(n)]
    if len(inputs) < 2:
        return {}
    above = _inputs_above(index, inputs)
    ways: dict[Node, dict[Node, int]] = {}
    for tree in trees:
        for number, leaf in enumerate(tree.leaves):
            skipped = plain_walk(index, leaf)[-1]
            if dims(leaf) != dims(tree.root) or skipped not in inputs:
                continue
            others = {n for k, n in enumerate(tree.leaves) if k != number}
            met = 0
            for other in others:
                met |= above[other]
            for bit, value in enumerate(inputs):
                if met >> bit & 1 and value is not skipped and not _leads(ways, skipped, value):
                    kind = ask(tree, number, value, skipped)
                    if kind is not None:
                        ways.setdefault(value, {})[skipped] = kind
    return ways


def _is_value(node: Node) -> bool:
    return is_float_tensor(node) and not is_state(node)


def _inputs_above(index: FlowIndex, inputs: list[Node]) -> dict[Node, int]:
    """For each node the inputs that it depends on, as bits."""
    above = {node: 1 << bit for bit, node in enumerate(inputs)}
    for node in index.nodes:
        if node not in above:
            above[node] = 0
            for source in index.inputs(node):
                above[node] |= above[source]
    return above


def _leads(ways: dict[Node, dict[Node, int]], later: Node, earlier: Node) -> bool:
    """Whether ``later`` is known to come from ``earlier``: the reverse cannot hold as well."""
    return any(n is earlier or _leads(ways, n, earlier) for n in ways.get(later, ()))
