"""What is recorded of a compilation, through the environment and by hand."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from mhc_compile import convert_, recorder
from mhc_compile.backend import mhc
from mhc_compile.config import MHCConfig
from mhc_compile.errors import MHCWarning
from mhc_compile.inspection import trace_stages
from mhc_compile.stages import DumpOptions


class Block(nn.Module):
    """One site."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Residual(nn.Module):
    """Three identical layers; a graph break behind the first on demand."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.layers[2](self.layers[1](x))


# Without seams, a site is one pre and one post.
APART = MHCConfig(inner="eager", skip_passes=("join_seams_pass",), recompute="off")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_OF_PROCESS", {})


def test_stages_are_the_plain_graph_each_pass_and_the_result() -> None:
    model = Residual()
    report, recorded = trace_stages(model, torch.randn(2, 8), config=APART)
    assert [(s.number, s.name) for s in recorded.stages] == [
        (0, "before"),
        (1, "widen_trunks_pass"),
        (99, "after"),
    ]
    before, _, after = recorded.stages
    assert "mhc" not in before.text
    assert before.counts["add"] == 3
    assert after.counts["mhc.pre"] == after.counts["mhc.post"] == 3
    assert len(report.converted) == 3
    assert not any("mhc" in name for name, _ in model.named_parameters())


def test_pictures_of_both_ends_fold_the_layers_and_widen_the_trunk() -> None:
    _, recorded = trace_stages(Residual(), torch.randn(2, 8), config=APART)
    before, after = (stage.view for stage in recorded.stages if stage.view is not None)
    assert [frame.times for frame in before.frames] == [3]
    assert [frame.times for frame in after.frames] == [3]
    assert {e.streams for e in before.edges if e.kind == "state"} == {1}
    assert {e.streams for e in after.edges if e.kind == "state"} == {4}
    assert [node.role for node in after.nodes] == [
        "input", "expand", "pre", "box", "post", "collapse", "output"
    ]  # fmt: skip


def test_seams_are_drawn_on_the_trunk_with_what_they_read_out() -> None:
    config = MHCConfig(inner="eager", recompute="off")
    options = DumpOptions(fold=False)
    _, recorded = trace_stages(Residual(), torch.randn(2, 8), config=config, options=options)
    after = recorded.stages[-1].view
    assert after is not None
    roles = [node.role for node in after.nodes]
    assert after.nodes[0].column == after.nodes[1].column == 0
    assert roles == ["input", "expand", "pre", "box", "seam", "box", "seam", "box", "post",
                     "collapse", "output"]  # fmt: skip
    out_of_first = {(e.target, e.kind) for e in after.edges if e.source == 4}
    assert out_of_first == {(5, "data"), (6, "state"), (6, "coefficients")}


def test_a_state_that_arrives_from_another_graph_is_drawn_as_streams() -> None:
    _, recorded = trace_stages(Residual(broken=True), torch.randn(2, 8))
    views = [s.view for s in recorded.stages if s.name == "after" and s.view is not None]
    assert len(views) == 2
    entry = next(edge for edge in views[1].edges if edge.kind == "state")
    assert views[1].nodes[entry.source].role == "input"
    assert entry.streams == 4


def test_kernels_bytes_and_source_lines_come_with_the_graph() -> None:
    _, recorded = trace_stages(Residual(), torch.randn(2, 8), config=APART)
    (graph,) = recorded.graphs
    assert list(graph.kernels) == ["sinkhorn_n4_float32.cpp"]
    assert "mhc_pre" in graph.kernels["sinkhorn_n4_float32.cpp"]
    state, narrow = 2 * 4 * 8 * 4, 2 * 8 * 4
    assert {"op": "mhc.expand", "calls": 1, "read": narrow, "written": state} in graph.traffic
    (name,) = graph.excerpts
    assert name.startswith("test_recorder.py:")
    assert "return x + torch.tanh(self.inner(x))" in graph.excerpts[name]


def test_joint_and_backward_graphs_are_recorded_on_demand() -> None:
    options = DumpOptions(phases=("bw", "joint"), formats=("txt",))
    _, recorded = trace_stages(Residual(), torch.randn(2, 8), config=APART, options=options)
    by_phase = {(s.phase, s.name): s for s in recorded.stages}
    assert by_phase["bw", "after"].counts["mhc.pre_backward"] == 3
    assert by_phase["joint", "after"].counts["mhc.pre"] == 3
    assert "tanh_backward" in by_phase["bw", "before"].counts
    assert "mhc.pre_backward" not in by_phase["joint", "before"].counts


def test_mhc_dump_writes_every_compilation_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_DUMP", str(tmp_path / "dump"))
    for size in (2, 3):
        model = Residual()
        x = torch.randn(size, 8)
        convert_(model, x, config=APART)
        torch.compile(model, backend=mhc, options={"inner": "eager"})(x)
    names = {p.relative_to(tmp_path / "dump").as_posix() for p in (tmp_path / "dump").rglob("*.*")}
    assert {"index.html", "graph_0/fw/00_before.txt", "graph_1/fw/99_after.txt"} <= names
    plain = (tmp_path / "dump/graph_0/fw/00_before.txt").read_text()
    assert "mhc" not in plain
    assert "mhc.post" in (tmp_path / "dump/graph_0/fw/99_after.txt").read_text()


def test_processes_of_one_run_dump_into_folders_of_their_own(tmp_path: Path) -> None:
    environment = {"MHC_DUMP": str(tmp_path), "WORLD_SIZE": "2", "RANK": "1"}
    found = recorder.recorder_of_environment(environment)
    assert found is not None
    assert found.directory == tmp_path / "rank_1"
    assert recorder.recorder_of_environment({}) is None


def test_stages_are_artifacts_of_the_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            metadata = getattr(record, "metadata", {})
            if "artifact" in metadata and metadata["artifact"]["name"].startswith("mhc_"):
                seen.append(metadata["artifact"]["name"])
                assert "def forward" in record.payload  # type: ignore[attr-defined]

    log = logging.getLogger("torch.__trace")
    handler = Collect()
    monkeypatch.setattr(log, "level", logging.DEBUG)
    log.addHandler(handler)
    monkeypatch.setenv("TORCH_TRACE", "")
    options = {"inner": "eager", "recompute": "off", "skip_passes": ("join_seams_pass",)}
    try:
        with pytest.warns(MHCWarning):
            torch.compile(Residual(), backend=mhc, options=options)(torch.randn(2, 8))
    finally:
        log.removeHandler(handler)
    assert seen == [
        "mhc_fw_00_before_graph_0",
        "mhc_fw_01_widen_trunks_pass_graph_0",
        "mhc_fw_99_after_graph_0",
    ]
