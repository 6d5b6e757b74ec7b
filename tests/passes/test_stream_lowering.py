"""`lower_streams_pass`: the plan in a graph, in torch's own operators. No GPU runs it here."""

import functools
import operator
from itertools import count
from typing import Any

import pytest
import torch
from torch._inductor.fx_passes.control_dependencies import control_deps  # noqa: TID251 - a name
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from mhc_compile._torch_private import torch_streams
from mhc_compile.passes.happens_before import find_races
from mhc_compile.passes.stream_graph import ENTRY, EXIT, steps_of, storages
from mhc_compile.passes.stream_lowering import StreamTable, lower_streams_pass
from mhc_compile.passes.stream_program import (
    Free,
    Hold,
    Instruction,
    Launch,
    Program,
    Record,
    Wait,
)
from mhc_compile.passes.streams import PLAN, STREAM, StreamPlan, assign_streams_pass
from tests.passes.stream_oracle import sanitizer_errors, syncs
from tests.passes.test_streams import SLOW, lowered, transformer

MAIN, SIDE = 0, 7
"""Numbers of the streams in a lowered graph."""
OPS = torch_streams()


def table(**changes: Any) -> StreamTable:
    """Numbers without objects, and no fence."""
    numbers = count(100)
    fields = {"side": lambda device: SIDE, "event": lambda device: next(numbers)}
    fields |= {"fence": lambda gm: None, **changes}
    return StreamTable(OPS.record, OPS.wait, OPS.hold, MAIN, **fields)


def on(device: str, gm: GraphModule) -> GraphModule:
    """The graph with fake tensors of another device."""
    with FakeTensorMode() as mode:

        def move(tensor: torch.Tensor) -> torch.Tensor:
            size, stride = tuple(tensor.shape), tensor.stride()
            return torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)

        for node in gm.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map_only(torch.Tensor, move, node.meta["val"])
    assert mode is not None
    return gm


@functools.cache
def backward(recompute: Any) -> GraphModule:
    return lowered(transformer(), recompute=recompute)["bw"]


def copied(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy to change, and where its nodes are."""
    graph, places = torch.fx.Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, places))
    return GraphModule(gm, graph), places


def planned(recompute: Any = "auto") -> tuple[GraphModule, StreamPlan]:
    gm = on("cuda", copied(backward(recompute))[0])
    assert assign_streams_pass(gm, (), device=SLOW).modified
    return gm, gm.meta[PLAN]


def stream_of(node: Node) -> int:
    return node.meta.get("custom", {}).get("stream", MAIN)


def read_back(gm: GraphModule) -> Program:
    """The program that a lowered graph stands for, from nothing but the graph."""
    nodes = list(gm.graph.nodes)
    lies_in = storages(nodes)
    on_side = {node: 1 for node in nodes if stream_of(node) == SIDE}
    launched = {s.name: s for s in steps_of(nodes, on_side) if isinstance(s, Launch)}
    last = {name: n for n in nodes for m in (n, *n.all_input_nodes) for name in lies_in[m]}
    program: list[Instruction] = [launched[ENTRY]]
    for node in nodes:
        if node.target in (OPS.record, OPS.wait, OPS.hold):
            program.append(_sync(node, lies_in))
        elif (name := EXIT if node.op == "output" else node.name) in launched:
            program.append(launched[name])
        if node.op != "output":
            program += [Free(name) for name, user in last.items() if user is node]
    return tuple(program)


def _sync(node: Node, lies_in: dict[Node, tuple[str, ...]]) -> Instruction:
    first, number = node.args
    stream = {MAIN: 0, SIDE: 1}[number]
    if node.target is OPS.hold:
        (storage,) = lies_in[first]
        return Hold(storage, stream)
    return Record(first, stream) if node.target is OPS.record else Wait(first, stream)


@pytest.mark.parametrize("recompute", ["auto", "off"])
def test_a_lowered_graph_is_the_program_of_its_plan(recompute: Any) -> None:
    gm, plan = planned(recompute)
    assert lower_streams_pass(gm, (), table=table()).modified
    gm.graph.lint()
    program = read_back(gm)
    for kind in (Record, Wait, Hold):
        expected = sum(isinstance(step, kind) for step in plan.program)
        assert sum(isinstance(step, kind) for step in program) == expected > 0
    side = {step.name for step in program if isinstance(step, Launch) and step.stream == 1}
    assert side == set(plan.side)
    assert find_races(program) == []
    assert sanitizer_errors(program) == 0


def test_a_sync_taken_out_of_a_lowered_graph_is_missed() -> None:
    gm, plan = planned()
    lower_streams_pass(gm, (), table=table())
    found = [node for node in gm.graph.nodes if node.target in (OPS.record, OPS.wait, OPS.hold)]
    assert len(found) == syncs(plan.program)
    for node in (found[0], found[len(found) // 2], found[-1]):
        copy, places = copied(gm)
        copy.graph.erase_node(places[node])
        program = read_back(copy)
        assert find_races(program)
        assert sanitizer_errors(program)


def test_parts_of_a_side_kernel_and_nothing_else_are_marked_for_the_compiler() -> None:
    gm, plan = planned()
    lower_streams_pass(gm, (), table=table())
    for node in gm.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else node
        assert (stream_of(node) == SIDE) == (source.name in plan.side)
        assert STREAM not in node.meta
    assert PLAN not in gm.meta


def test_what_the_user_has_noted_of_a_node_stays() -> None:
    gm, plan = planned()
    (node,) = [node for node in gm.graph.nodes if node.name == plan.side[0]]
    node.meta["custom"] = kept = {"note": 1}
    lower_streams_pass(gm, (), table=table())
    assert node.meta["custom"] == {"note": 1, "stream": SIDE}
    assert kept == {"note": 1}


def test_a_second_run_changes_nothing() -> None:
    gm, _ = planned()
    assert lower_streams_pass(gm, (), table=table()).modified
    assert not lower_streams_pass(gm, (), table=table()).modified


def test_a_graph_on_a_cpu_keeps_its_plan_and_gets_no_operators_of_streams() -> None:
    gm, _ = planned()
    on("cpu", gm)
    before = [node.name for node in gm.graph.nodes]
    assert not lower_streams_pass(gm, (), table=table()).modified
    assert [node.name for node in gm.graph.nodes] == before
    assert PLAN in gm.meta


def test_a_graph_without_a_plan_is_left_alone() -> None:
    gm = on("cuda", copied(backward("off"))[0])
    assert not lower_streams_pass(gm, (), table=table()).modified


def test_behind_torchs_fence_every_sync_is_tied_to_the_kernels_around_it() -> None:
    gm, plan = planned()
    lower_streams_pass(gm, (), table=table(fence=OPS.fence))
    gm.graph.lint()
    tied = [node for node in gm.graph.nodes if node.target is control_deps]
    events = sum(isinstance(step, Record | Wait) for step in plan.program)
    assert len(tied) == events
    assert not gm.graph.find_nodes(op="call_function", target=OPS.record)
    for node in tied:
        body = getattr(gm, node.args[1].target)
        (sync,) = [n for n in body.graph.nodes if n.target in (OPS.record, OPS.wait)]
        assert node.args[0], f"nothing stands before {sync.name}"
    # The number of the event, and that of its stream: each is recorded before it is waited for.
    recorded: set[int] = set()
    for node in tied:
        body = getattr(gm, node.args[1].target)
        (sync,) = [n for n in body.graph.nodes if n.target in (OPS.record, OPS.wait)]
        if sync.target is OPS.record:
            recorded.add(sync.args[0])
        else:
            assert sync.args[0] in recorded
