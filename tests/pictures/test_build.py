"""Boxes of real graphs: what is collapsed, hidden, joined and put on the trunk."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mhc_compile.config import MHCConfig
from mhc_compile.inspection import trace_stages
from mhc_compile.pictures.dot import to_dot
from mhc_compile.pictures.labels import short_path
from mhc_compile.pictures.svg import LANES, to_svg
from mhc_compile.pictures.view import GraphView, ViewEdge, ViewNode
from mhc_compile.stages import DumpOptions

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


class Layer(nn.Module):
    """Two sites, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Small(nn.Module):
    """Embeddings, three layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 8), nn.Embedding(5, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@cache
def _views(streams: int = 4, **options: object) -> tuple[GraphView, GraphView]:
    wanted = DumpOptions(**options)  # type: ignore[arg-type]
    config = MHCConfig(streams=streams, skip_passes=("join_seams_pass",), recompute="off")
    tokens = torch.zeros(2, 4, dtype=torch.long)
    _, recorder = trace_stages(Small(), tokens, config=config, options=wanted)
    before, after = (stage.view for stage in recorder.stages if stage.view is not None)
    return before, after


def _labels(view: GraphView) -> list[str]:
    return [node.lines[0] for node in view.nodes]


def test_modules_beside_the_trunk_are_boxes_and_equal_layers_one_frame() -> None:
    before, after = _views()
    assert _labels(before) == [
        "tokens", "tokens", "positions", "add", "norm1 → attention", "+", "norm2 → mlp", "+",
        "head", "output",
    ]  # fmt: skip
    (frame,) = before.frames
    assert (frame.times, frame.label) == (3, "layers.0 … layers.2")
    assert [node.role for node in after.nodes if node.role not in ("box", "input", "output")] == [
        "expand", "pre", "post", "pre", "post", "collapse"
    ]  # fmt: skip
    assert before.notes == ("not drawn: 1 operation on sizes, positions and masks",)


def test_collapse_none_draws_every_operation_and_no_fold_every_layer() -> None:
    folded, _ = _views()
    unfolded, _ = _views(fold=False)
    every, _ = _views(fold=False, collapse="none")
    assert unfolded.frames == ()
    assert len(folded.nodes) < len(unfolded.nodes) < len(every.nodes)
    assert all(node.ops == 1 for node in every.nodes)
    assert sum("linear" in label for label in _labels(every)) == 13


def test_too_many_boxes_are_collapsed_by_layer_and_that_is_said() -> None:
    before, after = _views(fold=False, max_nodes=15, collapse="none")
    layered, _ = _views(fold=False, collapse="layer")
    assert before.nodes == layered.nodes
    assert any("more than 15: collapsed by layer" in note for note in before.notes)
    assert sum(node.role == "post" for node in after.nodes) == 6


def test_no_edge_points_backwards_and_every_trunk_edge_has_the_streams() -> None:
    before, after = _views(streams=3, fold=False)
    for view, streams in ((before, 1), (after, 3)):
        assert all(edge.source < edge.target for edge in view.edges)
        assert {e.streams for e in view.edges if e.kind == "state"} == {streams}
    on_trunk = [e for e in before.edges if e.kind == "state"]
    assert [before.nodes[e.target].role for e in on_trunk] == ["add"] * 6
    assert [e.source for e in on_trunk[1:]] == [e.target for e in on_trunk[:-1]]


def test_the_dot_text_of_a_small_model_is_the_golden_one() -> None:
    before, after = _views()
    for name, view in (("before", before), ("after", after)):
        expected = (GOLDEN / f"picture_{name}.dot").read_text()
        assert to_dot(view, f"Small, {name}") == expected


def test_the_graph_as_data_names_op_shape_module_source_and_site() -> None:
    options = DumpOptions(formats=("json",))
    config = MHCConfig(skip_passes=("join_seams_pass",))
    _, recorder = trace_stages(Layer(), torch.randn(2, 8), config=config, options=options)
    after = json.loads(recorder.stages[-1].files["json"])
    assert after["schema"] == 1
    nodes = {node["name"]: node for node in after["nodes"]}
    assert nodes["pre"]["target"] == "mhc.pre"
    assert nodes["pre"]["site"] == "add0"
    assert nodes["u"]["shape"] == [2, 8]
    assert nodes["u"]["dtype"] == "float32"
    assert nodes["u"]["inputs"] == ["pre"]
    assert nodes["u"]["source"].startswith("test_build.py:")
    assert {node["module"] for node in after["nodes"]} >= {"norm1", "attention.0", "mlp.2"}


def test_as_many_lanes_as_streams_are_drawn_and_one_thick_line_beyond() -> None:
    nodes = tuple(ViewNode(lines=(t,), role="add", column=0, path="") for t in "ab")

    def drawn(streams: int) -> str:
        return to_svg(GraphView(nodes, (ViewEdge(0, 1, "state", streams),)), "t")

    assert [color in drawn(3) for color in LANES[:4]] == [True, True, True, False]
    assert drawn(3).count("<path") == 3
    assert drawn(12).count("<path") == 1
    assert "×12" in drawn(12)


def test_a_picture_is_described_for_those_who_cannot_see_it() -> None:
    before, _ = _views()
    svg = to_svg(before, "Small & before")
    assert 'role="img" aria-label="Small &amp; before"' in svg
    assert "<desc>10 boxes" in svg
    assert svg == to_svg(before, "Small & before")


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("L['self'].transformer.h.0", "transformer.h.0"),
        ("L['self'].__dict__['_modules']['down_blocks'].0.norm", "down_blocks.0.norm"),
        ("L['self']._modules['layers']._modules['1']", "layers.1"),
        ("L['fn'].layers[2]", "layers.2"),
        ("layers.2@1", "layers.2"),
    ],
)
def test_paths_are_those_of_named_modules(path: str, short: str) -> None:
    assert short_path(path, "") == short
