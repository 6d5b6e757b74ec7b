"""Nothing overlaps, whatever the graph: boxes, and lines across boxes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mhc_compile.pictures.layout import FAR, Box, lay_out
from mhc_compile.pictures.view import Frame, GraphView, ViewEdge, ViewNode

_ROLES = ("box", "add", "post", "pre", "expand", "input")


@st.composite
def views(draw: st.DrawFn) -> GraphView:
    """Any view: edges point downwards, nothing else is promised."""
    size = draw(st.integers(2, 14))
    nodes = tuple(
        ViewNode(
            lines=tuple(draw(st.lists(st.text("abc", min_size=1, max_size=20), min_size=1,
                                      max_size=3))),
            role=draw(st.sampled_from(_ROLES)),
            column=draw(st.integers(0, 2)),
            path="",
        )
        for _ in range(size)
    )  # fmt: skip
    pairs = [(a, b) for b in range(size) for a in range(b)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20))
    kinds = st.sampled_from(("state", "data", "coefficients"))
    edges = tuple(sorted(ViewEdge(a, b, draw(kinds), 4) for a, b in chosen))
    return GraphView(nodes, edges)


def _overlap(a: Box, b: Box) -> bool:
    return abs(a.x - b.x) < (a.width + b.width) / 2 and abs(a.y - b.y) < (a.height + b.height) / 2


@given(views())
def test_no_two_boxes_overlap(view: GraphView) -> None:
    boxes = lay_out(view).boxes
    assert not any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


@given(views())
def test_no_line_crosses_a_box_it_does_not_belong_to(view: GraphView) -> None:
    layout = lay_out(view)
    for line in layout.lines:
        for (ax, ay), (bx, by) in pairwise(line.points):
            middle = Box((ax + bx) / 2, (ay + by) / 2, abs(ax - bx), abs(ay - by))
            for i, box in enumerate(layout.boxes):
                if i not in (line.edge.source, line.edge.target):
                    assert not _overlap(middle, box), (line, i)


@given(views())
def test_lines_are_horizontal_or_vertical_and_stay_in_the_picture(view: GraphView) -> None:
    layout = lay_out(view)
    for line in layout.lines:
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(line.points))
        assert all(0 <= x <= layout.width and 0 <= y <= layout.height for x, y in line.points)


def _trunk(*, between: int) -> GraphView:
    """A trunk value, a branch of some boxes, and the add where they meet again."""
    branch = [ViewNode(lines=(f"b{i}",), role="box", column=1, path="") for i in range(between)]
    nodes = (
        ViewNode(lines=("x",), role="box", column=0, path=""),
        *branch,
        ViewNode(lines=("+",), role="add", column=0, path=""),
    )
    chain = [ViewEdge(i, i + 1) for i in range(between + 1)]
    return GraphView(nodes, (*chain, ViewEdge(0, between + 1, "state", 4)))


def test_a_trunk_is_one_straight_line_and_its_branch_a_tap_off_it() -> None:
    layout = lay_out(_trunk(between=2))
    lines = {(line.edge.source, line.edge.target): line.points for line in layout.lines}
    x = layout.boxes[0].x
    assert [point[0] for point in lines[0, 3]] == [x, x]
    assert lines[0, 1][0][0] == x
    assert layout.boxes[1].x > x


def test_a_frame_encloses_its_boxes_and_their_lines() -> None:
    view = _trunk(between=3)
    framed = GraphView(view.nodes, view.edges, (Frame(1, 4, 32, "h.0 … h.31"),))
    layout = lay_out(framed)
    (frame,) = layout.frames
    for box in layout.boxes[1:]:
        assert frame.left < box.x - box.width / 2
        assert box.x + box.width / 2 < frame.right
        assert frame.top < box.y - box.height / 2
        assert box.y + box.height / 2 < frame.bottom
    assert layout.boxes[0].y + layout.boxes[0].height / 2 < frame.top


def test_a_value_that_many_far_boxes_read_is_named_there_instead_of_drawn() -> None:
    nodes = [ViewNode(lines=("time",), role="box", column=0, path="")]
    nodes += [ViewNode(lines=(f"b{i}",), role="box", column=0, path="") for i in range(FAR + 6)]
    edges = [ViewEdge(0, i) for i in (1, FAR + 2, FAR + 3, FAR + 4)]
    layout = lay_out(GraphView(tuple(nodes), tuple(edges)))
    assert [line.edge.target for line in layout.lines] == [1]
    assert [i for i, node in enumerate(layout.view.nodes) if "reads time" in node.lines] == [
        FAR + 2, FAR + 3, FAR + 4
    ]  # fmt: skip
