"""Put the work of the streams around MLP branches on a side stream of the device.

    main   ... | mlp backward | weight gradients of attention | attention ...
    side                      | seam backward |

What follows a branch (its post or seam, and the backward of that) is short and limited by memory,
and all that comes next waits for it. On a single stream the gradients of weights, which nothing
waits for, stand before it; on a stream of its own, of high priority, it overtakes them. So do the
states that the backward makes again from saved ones.

The plan is checked for races before anybody sees it, and kept only where the estimate says that it
gains time. `stream_lowering` writes it into graphs for devices that have streams.

Paper: arXiv 2512.24880, section 4.3.3: the kernels after an FFN on a high-priority stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.collectives import is_collective
from mhc_compile.passes.estimate import H100, Device, node_seconds, transfer_seconds
from mhc_compile.passes.happens_before import check_program
from mhc_compile.passes.opnames import is_mhc
from mhc_compile.passes.schedule import reorder
from mhc_compile.passes.simulate import Costs, Timeline, simulate
from mhc_compile.passes.stream_branches import side_kernels
from mhc_compile.passes.stream_graph import launches, steps_of
from mhc_compile.passes.stream_order import deferred_order
from mhc_compile.passes.stream_program import MAIN, Launch, Program, synchronize

SIDE = 1
STREAM, PLAN = "mhc_stream", "mhc_streams"
"""Keys of ``node.meta`` (the stream of a side kernel) and of ``gm.meta`` (the plan)."""
_SYNC = 1e-6
"""Seconds in which the host records an event or waits for one: an assumption."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What runs on which stream, and what that is predicted to gain."""

    program: Program
    side: tuple[str, ...]
    """Kernels on the side stream."""
    order: tuple[str, ...]
    """All nodes, as the host has to reach them."""
    one: Timeline
    """The graph as it was, on a single stream."""
    two: Timeline

    @property
    def gains(self) -> bool:
        """Whether the second stream is predicted to save time."""
        return self.two.makespan < self.one.makespan


def plan_streams(graph: Graph, device: Device = H100) -> StreamPlan:
    """Plan two streams for a graph and predict what they take.

    Args:
        graph: an ATen graph of AOTAutograd, with fake values; on any device.
        device: whose costs to reckon with.

    Raises:
        VerificationError: the plan has a race (a fault of ours).
    """
    side = side_kernels(graph)
    order = deferred_order(graph, side)
    program = synchronize(steps_of(order, dict.fromkeys(side, SIDE)))
    check_program(program)
    costs = costs_of(graph, device)
    return StreamPlan(
        program=program,
        side=tuple(node.name for node in order if node in side),
        order=tuple(node.name for node in order),
        one=simulate(_on_one_stream(graph, program), costs),
        two=simulate(program, costs),
    )


def _on_one_stream(graph: Graph, program: Program) -> Program:
    """The launches of a program on the main stream, in the order of the graph."""
    launched = {step.name: step for step in program if isinstance(step, Launch)}
    steps = (launched[node.name] for node in graph.nodes if node.name in launched)
    return tuple(replace(step, stream=MAIN) for step in steps)


def costs_of(graph: Graph, device: Device) -> Costs:
    """What the launches of a graph take on a device.

    The time that an operation takes at least is the host's: kernels follow each other without it
    when the host is ahead.
    """
    kernels = [node for node in graph.nodes if launches(node)]
    return Costs(
        kernels={node.name: node_seconds(node, device) - device.launch for node in kernels},
        transfers={n.name: transfer_seconds(n, device) for n in kernels if is_collective(n)},
        launch=device.launch,
        sync=_SYNC,
    )


def assign_streams_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, device: Device = H100
) -> PassResult:
    """Put the nodes of a graph in the order of a plan for two streams, and note the plan.

    The plan goes to ``gm.meta``, the streams of kernels to their ``meta``. A graph to which the
    plan would gain nothing stays as it is. Results are bitwise the same either way.

    Args:
        gm: a forward or backward graph of AOTAutograd.
        example_inputs: ignored.
        device: whose costs to reckon with.

    Raises:
        VerificationError: see `plan_streams`.
    """
    del example_inputs
    if PLAN in gm.meta or not any(map(is_mhc, gm.graph.nodes)):
        return PassResult(gm, False)
    plan = plan_streams(gm.graph, device)
    if not plan.gains:
        return PassResult(gm, False)
    nodes = {node.name: node for node in gm.graph.nodes}
    reorder(gm.graph, [nodes[name] for name in plan.order])
    for name in plan.side:
        nodes[name].meta[STREAM] = SIDE
    gm.meta[PLAN] = plan
    return PassResult(gm, True)
