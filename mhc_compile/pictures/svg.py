"""A laid-out view as SVG: the same bytes wherever it is drawn."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from mhc_compile.pictures.layout import Box, FrameBox, Layout, Line, Point, lay_out
from mhc_compile.pictures.view import GraphView, ViewNode

LANES = (
    "#d97706", "#2563eb", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#be185d",
)  # fmt: skip
"""Colours of the streams; more streams than these share one thick line."""

_LANE, _RADIUS = 4.0, 9.0
_LABELLED = 130.0
"""Length from which on a line of mappings says so."""
_HEAD = 9.0
"""Length of an arrow head."""
COLORS = {"state": LANES[0], "data": "#64748b", "coefficients": "#7c3aed"}
FILLS = {
    "input": ("#ffffff", "#64748b"),
    "output": ("#ffffff", "#64748b"),
    "box": ("#eff6ff", "#334155"),
    "add": ("#fed7aa", "#b45309"),
    "trunk": ("#ffedd5", "#b45309"),
    "expand": ("#fef3c7", "#92400e"),
    "collapse": ("#fef3c7", "#92400e"),
    "pre": ("#dcfce7", "#15803d"),
    "post": ("#fed7aa", "#b45309"),
    "seam": ("#fed7aa", "#b45309"),
}
"""Fill and outline of a role."""
_STYLE = (
    "text{font-family:DejaVu Sans,Verdana,sans-serif;text-anchor:middle;fill:#0f172a}"
    ".a{font-size:13px}.b{font-size:11px;fill:#475569}.f,.c{text-anchor:end}.f{font-size:12px}"
    # lines that pass behind a label leave room for it
    ".f,.c{paint-order:stroke;stroke:#f8fafc;stroke-width:4px}"
)


def to_svg(view: GraphView, title: str) -> str:
    """The picture of ``view`` as an SVG document; ``title`` is what a screen reader says."""
    layout = lay_out(view)
    width, height = _number(layout.width), _number(layout.height)
    described = "; ".join([_summary(view), *view.notes])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(described)}</desc>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *(_frame(frame) for frame in layout.frames),
        *(part for line in _ordered(layout) for part in _line(line)),
        *(part for node, box in zip(layout.view.nodes, layout.boxes, strict=True)
          for part in _box(node, box)),
        *(_frame_label(frame) for frame in layout.frames),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _summary(view: GraphView) -> str:
    sites = sum(node.role in ("add", "post", "seam") for node in view.nodes)
    return f"{len(view.nodes)} boxes, {len(view.edges)} lines, {sites} residual sites drawn"


def _ordered(layout: Layout) -> list[Line]:
    """Trunks last: they lie on top of what crosses them."""
    return sorted(layout.lines, key=lambda line: line.edge.kind == "state")


def _frame(box: FrameBox) -> str:
    return (
        f'<rect x="{_number(box.left)}" y="{_number(box.top)}" '
        f'width="{_number(box.right - box.left)}" height="{_number(box.bottom - box.top)}" rx="10" '
        'fill="#f8fafc" stroke="#94a3b8" stroke-width="2"/>'
    )


def _frame_label(box: FrameBox) -> str:
    text = f"{box.frame.label}  × {box.frame.times}"
    x, y = _number(box.right - 10), _number(box.top + 19)
    return f'<text class="f" x="{x}" y="{y}">{escape(text)}</text>'


def _line(line: Line) -> Iterator[str]:
    edge = line.edge
    if edge.kind == "state" and 1 < edge.streams <= len(LANES):
        for lane in range(edge.streams):
            offset = (lane - (edge.streams - 1) / 2) * _LANE
            points = shifted(_shortened(line.points, _HEAD), offset)
            yield _path(points, LANES[lane], 2.6)
        yield _head(line.points, LANES[0], edge.streams * _LANE / 2 + 4)
        return
    color, width = COLORS[edge.kind], 1.3
    if edge.kind == "state":
        width = 4 if edge.streams == 1 else 9
    yield _path(_shortened(line.points, _HEAD), color, width, dashed=edge.kind == "coefficients")
    yield _head(line.points, color, 4 + width / 2)
    if edge.kind == "coefficients" and _distance(*line.points[-2:]) > _LABELLED:
        x, y = line.points[-2]
        yield f'<text class="b c" x="{_number(x - 8)}" y="{_number(y - 5)}">H_post, H_res</text>'
    if edge.streams > len(LANES):
        x, y = line.points[0]
        yield f'<text class="b" x="{_number(x + 26)}" y="{_number(y + 18)}">×{edge.streams}</text>'


def shifted(points: Sequence[Point], offset: float) -> list[Point]:
    """An orthogonal line moved sideways by ``offset``, so that lanes stay parallel at corners.

    >>> shifted([(0, 0), (0, 9), (-9, 9)], 2)
    [(2, 0), (2, 11), (-9, 11)]
    """
    moved = []
    for i, (x, y) in enumerate(points):
        for ax, bx in ((a[0], b[0]) for a, b in pairwise(points[max(0, i - 1) : i + 2])):
            if ax == bx:  # downwards: to the right of it
                x += offset
            else:  # the same side of a line that comes from there or goes on there
                y += offset if bx < ax else -offset
        moved.append((x, y))
    return moved


def _shortened(points: Sequence[Point], by: float) -> list[Point]:
    """The line without the end that the arrow head covers."""
    (ax, ay), (bx, by_) = points[-2], points[-1]
    length = abs(bx - ax) + abs(by_ - ay)
    part = max(0.0, 1 - by / length) if length else 0.0
    return [*points[:-1], (ax + (bx - ax) * part, ay + (by_ - ay) * part)]


def _path(points: Sequence[Point], color: str, width: float, *, dashed: bool = False) -> str:
    steps = [f"M{_number(points[0][0])} {_number(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        radius = min(_RADIUS, _distance(before, corner) / 2, _distance(corner, after) / 2)
        a, b = _towards(corner, before, radius), _towards(corner, after, radius)
        steps.append(f"L{_pair(a)}Q{_pair(corner)} {_pair(b)}")
    steps.append(f"L{_pair(points[-1])}")
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{"".join(steps)}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>'


def _head(points: Sequence[Point], color: str, half: float) -> str:
    (ax, ay), (bx, by) = points[-2], points[-1]
    length = _distance((ax, ay), (bx, by)) or 1.0
    dx, dy = (bx - ax) / length * _HEAD, (by - ay) / length * _HEAD
    side = (-dy / _HEAD * half, dx / _HEAD * half)
    corners = ((bx, by), (bx - dx + side[0], by - dy + side[1]),
               (bx - dx - side[0], by - dy - side[1]))  # fmt: skip
    return f'<polygon points="{" ".join(_pair(c, ",") for c in corners)}" fill="{color}"/>'


def _box(node: ViewNode, box: Box) -> Iterator[str]:
    fill, stroke = FILLS[node.role]
    paint = f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"'
    yield "<g>"
    if node.title:
        yield f"<title>{escape(node.title)}</title>"
    left, right = box.x - box.width / 2, box.x + box.width / 2
    top, bottom = box.y - box.height / 2, box.y + box.height / 2
    if node.role == "add":
        yield f'<circle cx="{_number(box.x)}" cy="{_number(box.y)}" r="15" {paint}/>'
    elif node.role in ("expand", "collapse", "post", "seam"):
        upper = 14 if node.role in ("expand", "post", "seam") else 0
        lower = 14 if node.role in ("collapse", "post", "seam") else 0
        corners: list[Point] = [(left + upper, top), (right - upper, top)]
        if node.role in ("post", "seam"):
            corners.append((right, box.y))
        corners += [(right - lower, bottom), (left + lower, bottom)]
        if node.role in ("post", "seam"):
            corners.append((left, box.y))
        yield f'<polygon points="{" ".join(_pair(c, ",") for c in corners)}" {paint}/>'
    else:
        yield (
            f'<rect x="{_number(left)}" y="{_number(top)}" width="{_number(box.width)}" '
            f'height="{_number(box.height)}" rx="7" {paint}/>'
        )
    for k, text in enumerate(node.lines):
        y = box.y + 4.5 + (k - (len(node.lines) - 1) / 2) * 15
        kind = "b" if k else "a"
        yield f'<text class="{kind}" x="{_number(box.x)}" y="{_number(y)}">{escape(text)}</text>'
    yield "</g>"


def _towards(start: Point, end: Point, by: float) -> Point:
    length = _distance(start, end) or 1.0
    return (
        start[0] + (end[0] - start[0]) / length * by,
        start[1] + (end[1] - start[1]) / length * by,
    )


def _distance(a: Point, b: Point) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _pair(point: Point, separator: str = " ") -> str:
    return f"{_number(point[0])}{separator}{_number(point[1])}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
