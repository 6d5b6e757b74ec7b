"""A layout without a library: one row a box, one column a nesting level, the trunk on the left.

A row holds one box only, so a horizontal line meets no other box; a vertical line runs down a
column where that is empty, else in the gutter between two columns. Hence no line ever crosses a
box, the picture needs no search, and the same view always gets the same coordinates.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mhc_compile.pictures.view import Frame, GraphView, ViewEdge, ViewNode

CHARACTER, SMALL_CHARACTER = 8.4, 6.9
"""Width of a character of the first line of a label, and of the others, in pixels."""
MARGIN = 16
_GAP = 30
"""Between two rows: a tap off a trunk runs through it."""
_TAP = 15
_FRAME_TOP, _FRAME_BOTTOM, _FRAME_SIDE = 36, 12, 14
_GUTTER, _TRACK = 26, 11
_PORT = 9
FAR, MANY = 10, 3
"""A value that ``MANY`` boxes more than ``FAR`` rows below read is named there, not drawn as
lines."""

Point = tuple[float, float]
Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Box:
    """Where a node stands: its centre and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Line:
    """The way of an edge: the corners of an orthogonal line, from source to target."""

    edge: ViewEdge
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class FrameBox:
    """Where a frame stands."""

    frame: Frame
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Coordinates of a whole view, in pixels; y grows downwards."""

    view: GraphView
    """As laid out: lines to far readers have become texts."""
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    frames: tuple[FrameBox, ...]
    width: float
    height: float


def lay_out(view: GraphView) -> Layout:
    """Place the boxes, lines and frames of ``view``."""
    return _Layouter(_name_far_sources(view)).run()


def _name_far_sources(view: GraphView) -> GraphView:
    """Replace lines to many far readers by a line of text in each of them."""
    far = defaultdict(list)
    for edge in view.edges:
        if edge.kind == "data" and edge.target - edge.source > FAR:
            far[edge.source].append(edge)
    named = {edge for edges in far.values() if len(edges) >= MANY for edge in edges}
    nodes = list(view.nodes)
    for edge in sorted(named):
        node, name = nodes[edge.target], view.nodes[edge.source].lines[0]
        nodes[edge.target] = _with_line(node, f"reads {name}")
    edges = tuple(edge for edge in view.edges if edge not in named)
    return GraphView(tuple(nodes), edges, view.frames, view.notes)


def _with_line(node: ViewNode, text: str) -> ViewNode:
    return ViewNode(
        lines=(*node.lines, text),
        role=node.role,
        column=node.column,
        path=node.path,
        ops=node.ops,
        title=node.title,
    )


def size_of(node: ViewNode) -> tuple[float, float]:
    """Width and height of a box that its label fits."""
    if node.role == "add":
        return 30, 30
    widths = [len(node.lines[0]) * CHARACTER, *(len(t) * SMALL_CHARACTER for t in node.lines[1:])]
    slanted = 44 if node.role in ("expand", "collapse", "post", "seam") else 22
    return max(widths) + slanted, 16 + 15 * len(node.lines)


@dataclass(slots=True)
class _Route:
    """The way of an edge before the columns have their places."""

    edge: ViewEdge
    shape: Literal["straight", "tap", "out", "in", "gutter"]
    gutter: int = 0
    """Column to whose left (-1: to the right of column 0) the line runs."""
    track: int = 0
    source_port: float = 0
    target_port: float = 0


@dataclass(slots=True)
class _Layouter:
    """Lays out with the trunk, column 0, on the right; `_mirrored` turns that round."""

    view: GraphView
    sizes: list[tuple[float, float]] = field(default_factory=list)
    rows: dict[int, list[int]] = field(default_factory=dict)
    """Column -> its rows."""
    trunk_ends: dict[int, int] = field(default_factory=dict)
    """Source of a trunk line that runs straight down -> its target."""

    def run(self) -> Layout:
        nodes = self.view.nodes
        self.sizes = [size_of(node) for node in nodes]
        for i, node in enumerate(nodes):
            self.rows.setdefault(node.column, []).append(i)
        for edge in self.view.edges:
            if edge.kind == "state" and self._is_straight(edge):
                self.trunk_ends[edge.source] = max(edge.target, self.trunk_ends.get(edge.source, 0))
        routes = [self._route(edge) for edge in self.view.edges]
        tracks = self._assign_tracks(routes)
        self._assign_ports(routes)
        centers, left, right = self._columns(tracks)
        tops = self._tops()
        boxes = tuple(
            Box(centers[node.column], tops[i] + self.sizes[i][1] / 2, *self.sizes[i])
            for i, node in enumerate(nodes)
        )
        lines = tuple(Line(r.edge, self._points(r, boxes, centers, tracks)) for r in routes)
        frames = tuple(
            FrameBox(
                frame,
                left - _FRAME_SIDE / 2,
                tops[frame.first] - _FRAME_TOP - 8,
                right + _FRAME_SIDE / 2,
                boxes[frame.last].y + self.sizes[frame.last][1] / 2 + _FRAME_BOTTOM,
            )
            for frame in self.view.frames
        )
        bottom = max((b.y + b.height / 2 for b in boxes), default=0) + MARGIN + _FRAME_BOTTOM
        width = right + MARGIN + _FRAME_SIDE
        return _mirrored(Layout(self.view, boxes, lines, frames, width, bottom))

    def _is_free(self, column: int, above: int, below: int) -> bool:
        """Whether no box of ``column`` stands strictly between two rows."""
        rows = self.rows.get(column, [])
        i = bisect_right(rows, above)
        return i >= len(rows) or rows[i] >= below

    def _is_straight(self, edge: ViewEdge) -> bool:
        columns = [self.view.nodes[i].column for i in (edge.source, edge.target)]
        return columns[0] == columns[1] and self._is_free(columns[0], edge.source, edge.target)

    def _route(self, edge: ViewEdge) -> _Route:
        source, target = (self.view.nodes[i].column for i in (edge.source, edge.target))
        if edge.kind != "coefficients" or edge.target == edge.source + 1:
            if self._is_straight(edge):
                return _Route(edge, "straight")
            if source < target and self.trunk_ends.get(edge.source, 0) > edge.target:
                return _Route(edge, "tap")
            if source < target and self._is_free(target, edge.source, edge.target):
                return _Route(edge, "out")
            if source > target and self._is_free(source, edge.source, edge.target):
                return _Route(edge, "in")
        if source == target:
            return _Route(edge, "gutter", -1 if source == 0 and edge.kind == "data" else source)
        if edge.kind == "coefficients":  # to the left of the branch, which lies between
            return _Route(edge, "gutter", max(source, target))
        return _Route(edge, "gutter", min(source, target))

    def _assign_tracks(self, routes: list[_Route]) -> Mapping[int, int]:
        """Give lines that share a gutter tracks of their own; returns how many each one needs."""
        used: dict[int, list[list[tuple[int, int, int]]]] = defaultdict(list)
        wanted = [route for route in routes if route.shape == "gutter"]
        for route in sorted(wanted, key=lambda r: r.edge.target - r.edge.source):
            source, target = route.edge.source, route.edge.target
            tracks = used[route.gutter]
            for number, spans in enumerate(tracks):
                if all(b < source or a > target or s == source for a, b, s in spans):
                    route.track = number
                    break
            else:
                route.track = len(tracks)
                tracks.append([])
            tracks[route.track].append((source, target, source))
        return {gutter: len(tracks) for gutter, tracks in used.items()}

    def _assign_ports(self, routes: list[_Route]) -> None:
        """Spread the lines that meet a side of a box."""
        ends: dict[tuple[int, Side], list[tuple[int, int, _Route, bool]]] = defaultdict(list)
        for route in routes:
            for is_source in (True, False):
                side = self._side(route, is_source)
                if side is not None:
                    own, other = route.edge.source, route.edge.target
                    if not is_source:
                        own, other = other, own
                    order = route.track if route.shape == "gutter" else -1
                    ends[own, side].append((other, order, route, is_source))
        for (node, _), found in ends.items():
            found.sort(key=lambda end: (end[0], end[1]))
            step = min(_PORT, (self.sizes[node][1] - 12) / len(found))
            for k, (_, _, route, is_source) in enumerate(found):
                offset = (k - (len(found) - 1) / 2) * step
                if is_source:
                    route.source_port = offset
                else:
                    route.target_port = offset

    def _side(self, route: _Route, is_source: bool) -> Side | None:
        """The side of a box at which a line leaves or arrives; None for top and bottom."""
        column = self.view.nodes[route.edge.source if is_source else route.edge.target].column
        match route.shape:
            case "gutter":
                return "left" if route.gutter >= column else "right"
            case "out":
                return "left" if is_source else None
            case "in":
                return None if is_source else "left"
        return None

    def _columns(self, tracks: Mapping[int, int]) -> tuple[dict[int, float], float, float]:
        """The middle of each column, and the left and right ends of all, gutters included."""
        left = float(MARGIN + _FRAME_SIDE)
        x = left
        centers = {}
        for column in sorted(self.rows, reverse=True):
            x += _GUTTER + _TRACK * tracks.get(column, 0)
            width = max(self.sizes[row][0] for row in self.rows[column])
            centers[column] = x + width / 2
            x += width
        if -1 in tracks:
            x += _GUTTER + _TRACK * tracks[-1]
        # The label of a frame has to end before the trunk that runs through it.
        label = max((len(f.label) + 8 for f in self.view.frames), default=0) * SMALL_CHARACTER
        missing = max(0.0, left + label + _GUTTER - centers.get(0, x))
        centers = {column: center + missing for column, center in centers.items()}
        return centers, left, x + missing + _FRAME_SIDE

    def _tops(self) -> list[float]:
        opening = {frame.first for frame in self.view.frames}
        closing = {frame.last for frame in self.view.frames}
        y = float(MARGIN)
        tops = []
        for i, (_, height) in enumerate(self.sizes):
            if i in opening:
                y += _FRAME_TOP
            tops.append(y)
            y += height + _GAP + (_FRAME_BOTTOM if i in closing else 0)
        return tops

    def _points(
        self,
        route: _Route,
        boxes: tuple[Box, ...],
        centers: Mapping[int, float],
        tracks: Mapping[int, int],
    ) -> tuple[Point, ...]:
        source, target = boxes[route.edge.source], boxes[route.edge.target]
        start_y, end_y = source.y + route.source_port, target.y + route.target_port
        bottom, top = source.y + source.height / 2, target.y - target.height / 2
        match route.shape:
            case "straight":
                return ((source.x, bottom), (target.x, top))
            case "tap":
                return ((source.x, top - _TAP), (target.x, top - _TAP), (target.x, top))
            case "out":
                left = self._edge_of(route.edge.source, source, "left", route.source_port)
                return ((left, start_y), (target.x, start_y), (target.x, top))
            case "in":
                left = self._edge_of(route.edge.target, target, "left", route.target_port)
                return ((source.x, bottom), (source.x, end_y), (left, end_y))
        x = self._track_x(route, centers)
        sides = [self._side(route, is_source) or "left" for is_source in (True, False)]
        return (
            (self._edge_of(route.edge.source, source, sides[0], route.source_port), start_y),
            (x, start_y),
            (x, end_y),
            (self._edge_of(route.edge.target, target, sides[1], route.target_port), end_y),
        )

    def _track_x(self, route: _Route, centers: Mapping[int, float]) -> float:
        column = max(route.gutter, 0)
        half = max(self.sizes[row][0] for row in self.rows[column]) / 2
        offset = half + 14 + _TRACK * route.track
        return centers[column] + (offset if route.gutter < 0 else -offset)

    def _edge_of(self, i: int, box: Box, side: Side, port: float) -> float:
        """Where a side of box ``i`` lies at the height of a port: circles and hexagons recede."""
        reach = box.width / 2
        role = self.view.nodes[i].role
        if role == "add":
            reach = max(0.0, (reach**2 - port**2)) ** 0.5
        elif role in ("post", "seam"):
            reach -= 14 * abs(port) / (box.height / 2)
        return box.x + (reach if side == "right" else -reach)


def _mirrored(layout: Layout) -> Layout:
    """The trunk on the left: there it is in sight however narrow the window is."""
    width = layout.width
    return Layout(
        layout.view,
        tuple(Box(width - box.x, box.y, box.width, box.height) for box in layout.boxes),
        tuple(
            Line(line.edge, tuple((width - x, y) for x, y in line.points)) for line in layout.lines
        ),
        tuple(
            FrameBox(f.frame, width - f.right, f.top, width - f.left, f.bottom)
            for f in layout.frames
        ),
        width,
        layout.height,
    )
