"""Layers that look and read alike are drawn once; all others are not."""

from collections.abc import Sequence

from mhc_compile.pictures.fold import fold_layers
from mhc_compile.pictures.view import GraphView, ViewEdge, ViewNode


def _node(label: str, path: str = "", role: str = "box") -> ViewNode:
    column = 0 if role == "add" else 1
    return ViewNode(lines=(label,), role=role, column=column, path=path)  # type: ignore[arg-type]


def _model(branches: Sequence[str], extra: Sequence[ViewEdge] = ()) -> GraphView:
    """``x``, a layer of one branch and one add for each label, and a reader of the end."""
    nodes = [_node("x")]
    edges = []
    for layer, label in enumerate(branches):
        i = len(nodes)
        nodes += [_node(label, f"h.{layer}"), _node("+", f"h.{layer}", "add")]
        edges += [ViewEdge(i - 1, i), ViewEdge(i, i + 1), ViewEdge(i - 1, i + 1, "state")]
    nodes.append(_node("head"))
    edges.append(ViewEdge(len(nodes) - 2, len(nodes) - 1))
    return GraphView(tuple(nodes), tuple(sorted([*edges, *extra])))


def test_identical_layers_become_one_frame_and_the_rest_keeps_its_lines() -> None:
    view = fold_layers(_model(["f"] * 32))
    (frame,) = view.frames
    assert (frame.first, frame.last, frame.times) == (1, 2, 32)
    assert frame.label == "h.0 … h.31"
    assert [node.lines[0] for node in view.nodes] == ["x", "f", "+", "head"]
    assert view.edges == (
        ViewEdge(0, 1), ViewEdge(0, 2, "state"), ViewEdge(1, 2), ViewEdge(2, 3)
    )  # fmt: skip


def test_layers_that_alternate_fold_in_pairs() -> None:
    view = fold_layers(_model(["local", "global"] * 5))
    assert [(f.times, f.last - f.first + 1) for f in view.frames] == [(5, 4)]


def test_a_layer_that_differs_is_drawn_on_its_own() -> None:
    view = fold_layers(_model(["first", "f", "f", "f", "last"]))
    assert [(f.times, f.label) for f in view.frames] == [(3, "h.1 … h.3")]
    assert len(view.nodes) == 1 + 3 * 2 + 1


def test_layers_that_read_different_values_are_not_folded() -> None:
    far = ViewEdge(0, 5)  # the third branch reads x as well
    assert not any(f.times > 2 for f in fold_layers(_model(["f"] * 3, [far])).frames)


def test_one_value_that_every_layer_reads_does_not_hinder() -> None:
    mask = [ViewEdge(0, 1 + 2 * layer, "coefficients") for layer in range(4)]
    view = fold_layers(_model(["f"] * 4, mask))
    assert [f.times for f in view.frames] == [4]
    assert ViewEdge(0, 1, "coefficients") in view.edges


def test_a_reader_of_all_layers_reads_the_one_that_is_drawn() -> None:
    ends = [ViewEdge(2 + 2 * layer, 9) for layer in range(4)]
    view = fold_layers(_model(["f"] * 4, ends))
    assert [f.times for f in view.frames] == [4]
    assert [e for e in view.edges if e.target == 3] == [ViewEdge(2, 3)]


def test_numbers_of_modules_and_sites_do_not_tell_layers_apart() -> None:
    view = fold_layers(_model([f"layers.{i} add{i}" for i in range(3)]))
    assert [f.times for f in view.frames] == [3]


def test_a_run_that_would_begin_inside_a_module_begins_at_the_next_one() -> None:
    # The first branch is longer, so the repeated pattern "+ f" starts within h.0.
    view = fold_layers(_model(["long", "f", "f", "f", "f"]))
    assert [(f.first, f.label) for f in view.frames] == [(3, "h.1 … h.4")]


def test_boxes_without_a_trunk_are_not_taken_for_layers_where_there_is_one() -> None:
    nodes = (*(_node("same") for _ in range(4)), *_model(["f", "f"]).nodes)
    edges = tuple(ViewEdge(e.source + 4, e.target + 4, e.kind) for e in _model(["f", "f"]).edges)
    assert [f.first for f in fold_layers(GraphView(nodes, edges)).frames] == [5]
