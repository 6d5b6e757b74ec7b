"""`mhc-compile explain --timeline`, and the option ``side_stream``."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile import ConfigError, MHCConfig, cli
from mhc_compile._torch_private import compile_inductor
from mhc_compile.backend import _lowering
from mhc_compile.convert import is_converted
from mhc_compile.errors import MHCWarning
from mhc_compile.inspection import lowered_graphs
from mhc_compile.passes.estimate import H100
from mhc_compile.passes.simulate import Span, Timeline
from mhc_compile.passes.stream_program import Launch, Record, Wait
from mhc_compile.passes.streams import StreamPlan, assign_streams_pass
from mhc_compile.stream_report import GraphStreams, StreamReport
from mhc_compile.tables import stream_tables, to_text
from tests.nets import Net, converted, example, run
from tests.passes.test_streams import SLOW

MODEL = """
from tests.nets import Net, example

def build():
    return Net(), (example(),)
"""


def report(two: float = 8e-6) -> StreamReport:
    """A backward of 10 microseconds that takes ``two`` on two streams."""
    one = Timeline((Span("a", 0, 0.0, 5e-6), Span("b", 0, 5e-6, 1e-5)), 1e-5, 4e-6)
    spans = (Span("a", 0, 0.0, 5e-6), Span("b", 1, 3e-6, two))
    program = (Launch("a", 0), Record(0, 0), Wait(0, 1), Launch("b", 1))
    plan = StreamPlan(program, ("b",), ("a", "b"), one, Timeline(spans, two, 6e-6))
    graph = GraphStreams(graph=0, phase="bw", plan=plan)
    return StreamReport(model="Toy", device=H100, graphs=(graph,))


def test_the_gain_is_told_for_one_stream_and_for_two() -> None:
    gains, _ = stream_tables(report())
    assert gains.rows == (("0 bw", "1", "10.0", "8.0", "20.0 %", "6.0", "kept"),)
    (row,) = stream_tables(report(two=1.2e-5))[0].rows
    assert row[-3:] == ("-20.0 %", "6.0", "left: no gain")


def test_lanes_show_when_each_stream_runs_something() -> None:
    lanes = {name: drawn for name, _, drawn in stream_tables(report())[1].rows}
    assert set(lanes) == {"one stream", "main", "side"}
    assert lanes["one stream"] == "#" * 72
    assert lanes["main"] == "#" * 36 + " " * 36
    busy = [column for column, shade in enumerate(lanes["side"]) if shade != " "]
    assert busy == list(range(21, 58))  # from 3 to 8 of 10 microseconds
    assert "Graph 0 bw, 10 microseconds" in to_text(stream_tables(report())[1])


def test_the_report_is_data() -> None:
    (graph,) = json.loads(report().to_json())["graphs"]
    assert (graph["records"], graph["waits"], graph["holds"]) == (1, 1, 0)
    assert graph["kept"] is True
    assert graph["two_streams"]["spans"][1] == {
        "name": "b", "stream": 1, "start": 3e-6, "end": 8e-6,
    }  # fmt: skip


def test_a_model_is_what_it_was_when_its_lowered_graphs_have_been_seen() -> None:
    model, x = Net(), example()
    before = list(model.state_dict())
    found, graphs = lowered_graphs(model, x)
    assert [(graph.graph, graph.phase) for graph in graphs] == [(0, "fw"), (0, "bw")]
    assert found.converted
    assert not is_converted(model)
    assert list(model.state_dict()) == before
    with torch.no_grad():
        _, graphs = lowered_graphs(model, x)
    assert [graph.phase for graph in graphs] == ["fw"]


def test_the_command_draws_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "timeline_model.py").write_text(MODEL)
    target = f"{tmp_path}/timeline_model.py:build"
    assert cli.main(["explain", target, "--timeline"]) == 0
    text = capsys.readouterr().out
    assert f"Predicted for {H100.name}" in text
    assert "Graph 0 bw" in text
    assert cli.main(["explain", target, "--timeline", "--json"]) == 0
    graphs = json.loads(capsys.readouterr().out)["graphs"]
    assert [graph["phase"] for graph in graphs] == ["fw", "bw"]
    assert all(graph["side"] for graph in graphs)


def test_the_timeline_and_the_memory_plan_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["explain", "x:y", "--timeline", "--memory"])
    assert raised.value.code == 2


@pytest.mark.parametrize(("inner", "runs"), [("inductor", True), ("aot_eager", False)])
def test_a_side_stream_is_for_inductor_alone_and_off_by_default(inner: Any, runs: bool) -> None:
    default = _lowering(MHCConfig(inner=inner), None, None)
    assert default is not None
    assert "streams" not in default.key
    lowering = _lowering(MHCConfig(inner=inner, side_stream=True), None, None)
    assert lowering is not None
    assert ("lower_streams_pass" in lowering.key) == runs
    assert lowering.side_stream == runs


def test_inductor_neither_caches_code_with_streams_nor_reuses_its_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda gm, inputs, config_patches: patches.append(config_patches),
    )
    for side_stream in (False, True):
        lowering = _lowering(MHCConfig(side_stream=side_stream), None, None)
        compile_inductor(torch.fx.symbolic_trace(torch.nn.ReLU()), (), None, lowering)
    without, with_streams = patches
    assert "allow_buffer_reuse" not in without
    assert with_streams["allow_buffer_reuse"] is False
    assert without["post_grad_custom_post_pass"][-1].uuid() is not None
    assert with_streams["post_grad_custom_post_pass"][-1].uuid() is None


def test_one_connection_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.warns(MHCWarning, match="CUDA_DEVICE_MAX_CONNECTIONS=1"):
        _lowering(MHCConfig(side_stream=True), None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _lowering(MHCConfig(), None, None)
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
        _lowering(MHCConfig(side_stream=True), None, None)


@pytest.mark.slow
def test_a_plan_changes_no_bit_of_a_step_that_inductor_compiles_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[bool] = []

    def assign(gm: GraphModule, inputs: Any) -> PassResult:
        result = assign_streams_pass(gm, inputs, device=SLOW)
        ran.append(result.modified)
        return result

    monkeypatch.setattr("mhc_compile.pipeline.assign_streams_pass", assign)
    model, x = converted(Net(4), example()), example()
    expected = run(torch.compile(model, backend="mhc"), model, x)
    torch._dynamo.reset()
    options = {"side_stream": True}
    found = run(torch.compile(model, backend="mhc", options=options), model, x)
    assert ran == [False, True]  # forward and backward
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_a_side_stream_is_on_or_off() -> None:
    with pytest.raises(ConfigError, match="side_stream='auto' is not allowed"):
        MHCConfig(side_stream="auto")  # type: ignore[arg-type]
