"""What an ATen graph launches, and in which storages its values lie.

A view launches nothing: what reads it reads the storage it looks at. So do the parts of a tuple,
and the wait for a collective, whose result is the tensor that the collective writes.
"""

import operator
from collections.abc import Iterable, Mapping

from torch.fx import Node

from mhc_compile.passes.aliases import written_values
from mhc_compile.passes.collectives import is_collective, is_wait, tensors
from mhc_compile.passes.estimate import is_free, shows_operand
from mhc_compile.passes.opnames import first_input
from mhc_compile.passes.stream_program import MAIN, Free, Launch, Step
from mhc_compile.passes.values import value_of

ENTRY, EXIT = "<inputs>", "<outputs>"
"""Launches that stand for whatever made the inputs, and for whatever reads the outputs and may
overwrite the inputs (an optimizer step)."""


def launches(node: Node) -> bool:
    """Whether a node runs a kernel, or waits for a collective."""
    return node.op.startswith("call_") and (is_wait(node) or not is_free(node))


def storages(nodes: Iterable[Node]) -> dict[Node, tuple[str, ...]]:
    """The storages that each node's value lies in, by names; () for what is no tensor.

    Args:
        nodes: of a whole graph, in an order in which they can run.
    """
    found: dict[Node, tuple[str, ...]] = {}
    for node in nodes:
        found[node] = _storages(node, found)
    return found


def kernel_users(node: Node) -> set[Node]:
    """The kernels, and the output, that read what ``node`` makes: through views."""
    found: set[Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "output" or launches(user):
            found.add(user)
        else:
            stack.extend(user.users)
    return found


def kernel_inputs(node: Node) -> set[Node]:
    """The kernels and inputs of the graph that made what ``node`` reads: through views."""
    return {maker(source) for source in node.all_input_nodes}


def maker(node: Node) -> Node:
    """The kernel, or the input of the graph, whose result ``node`` is, or is a view of."""
    while not launches(node) and node.op not in ("placeholder", "get_attr"):
        source = first_input(node)
        if source is None:
            break
        node = source
    return node


def steps_of(nodes: Iterable[Node], stream_of: Mapping[Node, int]) -> list[Step]:
    """The launches of a graph, and the drops of storages at their last use.

    Args:
        nodes: of a whole ATen graph with fake values, in the order in which they run.
        stream_of: the streams of kernels; all others run on `MAIN`.
    """
    nodes = list(nodes)
    lies_in = storages(nodes)
    inputs = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    given = tuple(name for node in inputs for name in lies_in[node])
    last = {name: node for node in nodes for name in _used(node, lies_in)}
    dropped: dict[Node, list[str]] = {}
    for name, node in last.items():
        dropped.setdefault(node, []).append(name)
    steps: list[Step] = [Launch(ENTRY, MAIN, (), given)]
    for node in nodes:
        if node.op == "output":
            steps.append(Launch(EXIT, MAIN, _read(node, lies_in), given))
            break
        if launches(node):
            steps.append(_launch(node, stream_of.get(node, MAIN), lies_in))
        steps.extend(Free(name) for name in dropped.get(node, ()))
    return steps


def _launch(node: Node, stream: int, lies_in: Mapping[Node, tuple[str, ...]]) -> Launch:
    read = _read(node, lies_in)
    if is_wait(node):
        return Launch(node.name, stream, read, read, "wait")
    changed = [name for value in written_values(node) for name in lies_in[value]]
    made = [name for name in lies_in[node] if name not in read]
    written = tuple(dict.fromkeys((*changed, *made)))
    return Launch(node.name, stream, read, written, "start" if is_collective(node) else "")


def _read(node: Node, lies_in: Mapping[Node, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for n in node.all_input_nodes for name in lies_in[n]))


def _used(node: Node, lies_in: Mapping[Node, tuple[str, ...]]) -> tuple[str, ...]:
    return (*lies_in[node], *_read(node, lies_in))


def _storages(node: Node, found: Mapping[Node, tuple[str, ...]]) -> tuple[str, ...]:
    value = value_of(node)
    if node.op == "output" or not tensors(value):
        return ()
    if node.target is operator.getitem:
        source = maker(node)
        part = f"{source.name}.{node.args[1]}"
        own = found[node.args[0]]  # type: ignore[index]
        return (part,) if part in own else own
    if written := written_values(node):
        return tuple(dict.fromkeys(name for value in written for name in found[value]))
    if shows_operand(node):
        return found[node.all_input_nodes[0]]
    if isinstance(value, tuple | list):
        return tuple(f"{node.name}.{i}" for i, part in enumerate(value) if tensors(part))
    return (node.name,)
