"""Draw identical neighbouring layers once.

A layer is a run of boxes that holds a part of a trunk, where there is one. Two runs are identical
if their boxes look alike and every box reads the same: the corresponding box of its own run, or of
the run before, or the very same box outside (a mask, the output of an encoder).
"""

import re
from collections.abc import Sequence

from mhc_compile.pictures.view import SPINE, Frame, GraphView, ViewEdge, ViewNode

_LONGEST_LAYER = 250
# The place of a module in a list, and of a site in its module.
_NUMBER = re.compile(r"(?<=\.)\d+\b|\badd\d+\b")
_Reads = frozenset[tuple[str, int]]
"""(kind, position) of what a box reads."""


def fold_layers(view: GraphView) -> GraphView:
    """The view with each run of identical layers drawn as one `Frame`."""
    runs = _find_runs(view)
    if not runs:
        return view
    place: dict[int, int] = {}  # position -> position of its stand-in
    nodes: list[ViewNode] = []
    frames: list[Frame] = []
    again: set[int] = set()  # boxes that another one stands for
    i = 0
    for start, period, times in [*runs, (len(view.nodes), 0, 0)]:
        while i < start:
            place[i] = len(nodes)
            nodes.append(view.nodes[i])
            i += 1
        first = len(nodes)
        for k in range(period * times):
            place[start + k] = first + k % period
            if k >= period:
                again.add(start + k)
        nodes += view.nodes[start : start + period]
        if times:
            last = start + period * (times - 1)
            label = _label(view.nodes[start : start + period], view.nodes[last : last + period])
            frames.append(Frame(first, first + period - 1, times, label))
        i = start + period * times
    edges = {
        ViewEdge(place[e.source], place[e.target], e.kind, e.streams)
        for e in view.edges
        if e.target not in again and place[e.source] < place[e.target]
    }
    return GraphView(tuple(nodes), tuple(sorted(edges)), tuple(frames), view.notes)


def _find_runs(view: GraphView) -> list[tuple[int, int, int]]:
    """(start, period, times) of what to fold, from top to bottom."""
    looks = [(n.role, n.column, *(_NUMBER.sub("#", line) for line in n.lines)) for n in view.nodes]
    numbers = {look: number for number, look in enumerate(dict.fromkeys(looks))}
    alike = [numbers[look] for look in looks]
    reads = _reads(view)
    size = len(alike)
    longest = min(_LONGEST_LAYER, size // 2)
    # matching[p][i]: how many boxes from i on look like those p further down
    matching = {p: _matching(alike, p) for p in range(1, longest + 1)}
    has_trunk = any(node.role in SPINE for node in view.nodes)
    runs = []
    i = 0
    while i < size:
        best = (0, 0, 0)
        for period in range(1, min(longest, (size - i) // 2) + 1):
            if matching[period][i] < period:
                continue
            block = view.nodes[i : i + period]
            if has_trunk and not any(node.role in SPINE for node in block):
                continue
            times = _times(reads, i, period, matching[period][i] // period + 1)
            best = max(best, ((times - 1) * period, -period, times))
        covered, period, times = best
        if not covered:
            i += 1
            continue
        run = _aligned(view.nodes, reads, (i, -period, times), matching[-period])
        if _is_cut(view.nodes, run):
            i += 1
            continue
        runs.append(run)
        i = run[0] + run[1] * run[2]
    return runs


def _aligned(
    nodes: Sequence[ViewNode],
    reads: Sequence[_Reads],
    run: tuple[int, int, int],
    matching: Sequence[int],
) -> tuple[int, int, int]:
    """The run moved down to where modules begin, at the price of one layer at most.

    A first layer with an extra part lets the run start in the middle of it.
    """
    start, period, times = run
    best = (-1, 0, run)
    for shift in range(period):
        i = start + shift
        now = _times(reads, i, period, matching[i] // period + 1)
        if now >= max(2, times - 1):
            depth = len(_common([node.path for node in nodes[i : i + period]]))
            best = max(best, (depth, -shift, (i, period, now)))
    return best[2]


def _is_cut(nodes: Sequence[ViewNode], run: tuple[int, int, int]) -> bool:
    """Whether the first two layers of a run share a module: it begins in the middle of one."""
    start, period, _ = run
    first = {node.path for node in nodes[start : start + period]}
    second = {node.path for node in nodes[start + period : start + 2 * period]}
    return first != second and not first.isdisjoint(second)


def _matching(alike: Sequence[int], period: int) -> list[int]:
    counts = [0] * (len(alike) + 1)
    for i in range(len(alike) - period - 1, -1, -1):
        counts[i] = counts[i + 1] + 1 if alike[i] == alike[i + period] else 0
    return counts


def _reads(view: GraphView) -> list[_Reads]:
    reads: list[set[tuple[str, int]]] = [set() for _ in view.nodes]
    for edge in view.edges:
        reads[edge.target].add((edge.kind, edge.source))
    return [frozenset(found) for found in reads]


def _times(reads: Sequence[_Reads], start: int, period: int, most: int) -> int:
    """How many runs from ``start`` on read alike."""
    for times in range(1, most):
        for k in range(period):
            i = start + (times - 1) * period + k
            # What the first run reads from above may be anything: the others read the run before.
            entry = start if times == 1 else 0
            if not _same(reads[i], reads[i + period], period, entry):
                return times
    return most


def _same(one: _Reads, other: _Reads, period: int, entry: int) -> bool:
    if len(one) != len(other):
        return False
    left = set(other)
    for kind, source in one:
        for candidate in ((kind, source + period), (kind, source)):
            if candidate in left:
                left.remove(candidate)
                break
        else:
            if source >= entry:
                return False
            carried = next((c for c in left if c[0] == kind and c[1] < entry + period), None)
            if carried is None:
                return False
            left.remove(carried)
    return True


def _label(first: Sequence[ViewNode], last: Sequence[ViewNode]) -> str:
    """``"h.0 … h.47"``: where the first and the last of a run lie."""
    paths = [_common([node.path for node in nodes]) for nodes in (first, last)]
    ends = first[0].path, last[-1].path
    if paths[0] == paths[1] and ends[0] != ends[1]:  # a run of several layers
        paths = list(ends)
    if paths[0] == paths[1]:
        named = [(a.lines[0], b.lines[0]) for a, b in zip(first, last, strict=True)]
        differ = [f"{a} … {b}" for a, b in named if a != b and not a.startswith("mhc.")]
        return paths[0] or "".join(differ[:1])
    return f"{paths[0]} … {paths[1]}"


def _common(paths: Sequence[str]) -> str:
    """The longest dotted prefix of all ``paths``."""
    parts = [path.split(".") for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
