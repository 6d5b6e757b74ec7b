"""Write a plan for two streams into a graph, with torch's own operators for streams.

    Record(event, stream)    torch.ops.streams.record_event     Launch(kernel, stream)
    Wait(event, stream)      torch.ops.streams.wait_event         kernel.meta["custom"]["stream"]
    Hold(storage, stream)    torch.ops.streams.record_stream

Only for devices that have streams. Tested on the structure of graphs alone: no GPU has run one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.collectives import tensors
from mhc_compile.passes.stream_graph import EXIT, storages
from mhc_compile.passes.stream_order import parts
from mhc_compile.passes.stream_program import MAIN, Free, Hold, Launch, Record, Wait
from mhc_compile.passes.streams import PLAN, STREAM, StreamPlan
from mhc_compile.passes.values import is_tensor, value_of

DEVICES = ("cuda", "xpu")


@dataclass(frozen=True, slots=True)
class StreamTable:
    """Torch's operators for streams, and the table of objects that their numbers stand for."""

    record: Any
    """Operator (event, stream)."""
    wait: Any
    """Operator (event, stream)."""
    hold: Any
    """Operator (tensor, stream)."""
    current: int
    """Number of the stream that calls the graph."""
    side: Callable[[torch.device], int]
    """Number of a stream of high priority."""
    event: Callable[[torch.device], int]
    """Number of a new event."""
    fence: Callable[[GraphModule], None]
    """Keeps compilers behind this pass from moving kernels over syncs."""


def lower_streams_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, table: StreamTable
) -> PassResult:
    """Put the syncs of the plan that `assign_streams_pass` has noted into the graph, in place.

    Args:
        gm: a graph in the order of its plan; one without a plan, or on a device without streams,
            stays as it is. The plan is taken off.
        example_inputs: ignored.
        table: where streams and events get their numbers.
    """
    del example_inputs
    device = _device(gm)
    if PLAN not in gm.meta or device is None or device.type not in DEVICES:
        return PassResult(gm, False)
    plan: StreamPlan = gm.meta.pop(PLAN)
    streams = {MAIN: table.current}
    for node in gm.graph.nodes:
        if STREAM in node.meta:
            number = node.meta.pop(STREAM)
            if number not in streams:
                streams[number] = table.side(device)
            for part in (node, *parts(node)):
                custom = part.meta.get("custom", {})
                part.meta["custom"] = {**custom, "stream": streams[number]}
    _insert(gm, plan, streams, table, device)
    table.fence(gm)
    return PassResult(gm, True)


def _insert(
    gm: GraphModule,
    plan: StreamPlan,
    streams: Mapping[int, int],
    table: StreamTable,
    device: torch.device,
) -> None:
    graph = gm.graph
    nodes = {node.name: node for node in graph.nodes}
    lies_in = storages(graph.nodes)
    holder = {name: n for n in reversed(graph.nodes) if is_tensor(n) for name in lies_in[n]}
    events: dict[int, int] = {}
    behind = graph.find_nodes(op="placeholder")[-1]
    waits: list[Wait] = []
    for step in plan.program:
        match step:
            case Wait():
                waits.append(step)
            case Launch(name):
                node = graph.output_node() if name == EXIT else nodes.get(name, behind)
                with graph.inserting_before(node):
                    for wait in waits:
                        arguments = (events[wait.event], streams[wait.stream])
                        graph.call_function(table.wait, arguments)
                waits = []
                behind = [node, *parts(node)][-1]
            case Record(event, stream):
                events[event] = table.event(device)
                with graph.inserting_after(behind):
                    behind = graph.call_function(table.record, (events[event], streams[stream]))
            case Hold(storage, stream):
                with graph.inserting_after(behind):
                    behind = graph.call_function(table.hold, (holder[storage], streams[stream]))
            case Free():
                continue


def _device(gm: GraphModule) -> torch.device | None:
    for node in gm.graph.nodes:
        for tensor in tensors(value_of(node)):
            return tensor.device
    return None
