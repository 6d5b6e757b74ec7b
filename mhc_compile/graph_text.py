"""A graph as text and as data: the same bytes for the same graph, without addresses or weights."""

import math
import re
from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import dims, dtype_of, source_line, value_of
from mhc_compile.pictures.labels import short_path

GRAPH_SCHEMA = 1
"""Version of `graph_data`."""


def readable(gm: GraphModule) -> str:
    """For people: shapes, strides and devices of all values, with the source lines above them."""
    text = gm.print_readable(print_output=False, include_stride=True, include_device=True)
    # Dynamo's arguments get a second name each, in lower case, by a line of its own.
    inputs = gm.graph.find_nodes(op="placeholder")
    name_of = {str(node.target): node.name for node in inputs if node.target != node.name}
    renaming = {f"{name} = {argument}" for argument, name in name_of.items()}
    lines = [line for line in text.split("\n") if line.strip() not in renaming]
    for number, line in enumerate(lines):
        if "def forward(" in line:
            lines[number] = re.sub(r"\w+", lambda word: name_of.get(word[0], word[0]), line)
            break
    return "\n".join(lines)


def graph_data(gm: GraphModule) -> dict[str, Any]:
    """For programs: one entry a node, in execution order."""
    return {"schema": GRAPH_SCHEMA, "nodes": [_node(node) for node in gm.graph.nodes]}


def op_counts(gm: GraphModule) -> dict[str, int]:
    """How often each operation occurs, by name."""
    counts = Counter(op_name(node) for node in gm.graph.nodes if node.op.startswith("call_"))
    return dict(sorted(counts.items()))


def bytes_of(value: Any) -> int | None:
    """Bytes of all tensors in ``value``; None if a size is symbolic."""
    if isinstance(value, tuple | list):
        parts = [bytes_of(item) for item in value]
        return None if None in parts else sum(part for part in parts if part is not None)
    if not isinstance(value, torch.Tensor):
        return 0
    sizes: list[Any] = list(value.shape)  # torch's stubs hide that a size may be symbolic
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    return int(math.prod(sizes)) * value.element_size()


def traffic(gm: GraphModule) -> list[dict[str, Any]]:
    """Bytes that the mhc ops of a graph read and write, if each reads every operand once.

    Returns:
        For each op: ``op``, ``calls``, ``read`` and ``written``; the bytes are None where a size
        is symbolic or unknown.
    """
    rows: dict[str, list[tuple[int | None, int | None]]] = {}
    for node in gm.graph.nodes:
        name = op_name(node)
        if name.startswith("mhc."):
            read = bytes_of([value_of(operand) for operand in node.all_input_nodes])
            written = None if value_of(node) is None else bytes_of(value_of(node))
            rows.setdefault(name, []).append((read, written))
    return [
        {
            "op": name,
            "calls": len(calls),
            "read": _total([read for read, _ in calls]),
            "written": _total([written for _, written in calls]),
        }
        for name, calls in sorted(rows.items())
    ]


def _total(parts: list[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _node(node: Node) -> dict[str, Any]:
    dtype = dtype_of(node)
    return {
        "name": node.name,
        "op": node.op,
        "target": node.target if isinstance(node.target, str) else op_name(node),
        "inputs": [source.name for source in node.all_input_nodes],
        "shape": [size if isinstance(size, int) else str(size) for size in dims(node)],
        "dtype": "" if dtype is None else str(dtype).removeprefix("torch."),
        "module": _module(node),
        "source": source_line(node),
        "site": str(node.meta.get("custom", {}).get("mhc", "")),
    }


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return short_path(next(reversed(stack.values()))[0], "") if stack else ""
