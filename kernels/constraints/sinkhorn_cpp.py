"""The C++ lines of the two Sinkhorn constraints, unrolled over the n x n entries.

Matrices stay in registers, each entry a vector over tokens. Going back, the matrix before a step is
the one after it times that step's divisors: only those are kept, on the stack.
"""

from collections.abc import Callable, Iterator

from mhc_compile.kernels.cpp.text import (
    block,
    column,
    each,
    function,
    items,
    largest,
    literal,
    row,
    total,
)
from mhc_compile.kernels.spec import SiteSpec

Lines = Iterator[str]
Indices = Callable[[str, int], list[str]]  # `row` or `column`


def sinkhorn_cpp(spec: SiteSpec, start_eps: bool) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.cpp`.

    Args:
        spec: the site.
        start_eps: whether eps is also added after the first column step.
    """
    n, eps = spec.streams, spec.sinkhorn_eps
    first = _first_steps(n, eps, eps if start_eps else 0.0)
    step, undo = "vec* m, vec* divisors", "vec* g, vec* m, const vec* divisors"
    functions = (
        function("first_steps(const vec* h, vec* start, vec* divisors, vec* m)", first),
        function(f"divide_columns({step})", _divide(column, n, eps)),
        function(f"divide_rows({step})", _divide(row, n, eps)),
        function(f"undo_columns({undo})", _undo(column, n)),
        function(f"undo_rows({undo})", _undo(row, n)),
        function("matrix(const vec* h, vec* out)", _matrix(spec)),
        function("matrix_backward(const vec* dm, const vec* h, vec* dh)", _backward(spec)),
    )
    title = f"// (19): exp, then {spec.iters} times columns and rows divided by their sums.\n"
    return title + "".join(functions)


def _first_steps(n: int, eps: float, start_eps: float) -> Lines:
    yield f"vec top[{n}], column[{n}];"

    def start(j: str) -> Lines:
        line = column(j, n)
        yield f"top[{j}] = {largest(items('h', line))};"
        yield from (f"start[{k}] = exp(h[{k}] - top[{j}]);" for k in line)
        yield f"column[{j}] = 1.0f / ({total(items('start', line))});"
        yield " ".join(f"start[{k}] *= column[{j}];" for k in line)

    def on_logarithms(i: str) -> Lines:
        line = row(i, n)
        logs = [f"h[{k}] - top[{j}]" for j, k in enumerate(line)]
        yield f"const vec high{i} = {largest(logs)};"
        for j, k in enumerate(line):
            yield f"m[{k}] = exp(h[{k}] - top[{j}] - high{i}) * column[{j}];"

    yield from each(n, "j", start)
    if eps == 0.0:
        yield "// Relative to the row's maximum, too: a whole row may be far below its columns'."
        yield from each(n, "i", on_logarithms)
    else:
        plus = f" + {literal(start_eps)}" if start_eps else ""
        yield from each(n, "i", lambda i: (f"m[{k}] = start[{k}]{plus};" for k in row(i, n)))
    yield from _divide(row, n, eps)


def _divide(line: Indices, n: int, eps: float) -> Lines:
    """``m /= sum(m) + eps`` along each line; the divisors are written down."""
    plus = f" + {literal(eps)}" if eps else ""

    def sums(i: str) -> Lines:
        yield f"divisors[{i}] = {total(items('m', line(i, n)))}{plus};"

    def quotients(i: str) -> Lines:
        yield f"const vec inverse{i} = 1.0f / divisors[{i}];"
        yield " ".join(f"m[{k}] *= inverse{i};" for k in line(i, n))

    yield from each(n, "i", sums)
    yield from each(n, "i", quotients)


def _undo(line: Indices, n: int) -> Lines:
    """``g = (g - sum(g m)) / divisor`` along each line, and the m before the step."""

    def undo(i: str) -> Lines:
        yield f"const vec inverse{i} = 1.0f / divisors[{i}];"
        yield f"const vec dot{i} = {dot(line(i, n), 'm')};"
        yield from (f"g[{k}] = (g[{k}] - dot{i}) * inverse{i};" for k in line(i, n))
        yield " ".join(f"m[{k}] *= divisors[{i}];" for k in line(i, n))

    yield from each(n, "i", undo)


def _matrix(spec: SiteSpec) -> Lines:
    n, entries = spec.streams, spec.streams * spec.streams
    yield f"vec m[{entries}], start[{entries}], divisors[{n}];"
    yield "first_steps(h, start, divisors, m);"
    steps = ["divide_columns(m, divisors);", "divide_rows(m, divisors);"]
    yield from block(f"for (int k = 1; k < {spec.iters}; ++k)", steps)
    yield f"for (int i = 0; i < {entries}; ++i) out[i] = m[i];"


def _backward(spec: SiteSpec) -> Lines:
    n, iters, entries = spec.streams, spec.iters, spec.streams * spec.streams
    exact = spec.sinkhorn_eps == 0.0

    def first_rows(i: str) -> Lines:
        yield f"const vec dot{i} = {dot(row(i, n), 'm')};"
        for k in row(i, n):
            if exact:
                yield f"g[{k}] = m[{k}] * (g[{k}] - dot{i});"
            else:
                yield f"g[{k}] = (g[{k}] - dot{i}) / divisors[{i}];"

    def first_columns(j: str) -> Lines:
        line = column(j, n)
        yield f"const vec sum{j} = {total(items('g', line)) if exact else dot(line, 'start')};"
        for k in line:
            if exact:
                yield f"dh[{k}] = g[{k}] - start[{k}] * sum{j};"
            else:
                yield f"dh[{k}] = start[{k}] * (g[{k}] - sum{j});"

    yield f"vec m[{entries}], g[{entries}], start[{entries}], divisors[{n}];"
    yield f"vec by_column[{iters}][{n}], by_row[{iters}][{n}];"
    yield "first_steps(h, start, divisors, m);"
    steps = ["divide_columns(m, by_column[k]);", "divide_rows(m, by_row[k]);"]
    yield from block(f"for (int k = 1; k < {iters}; ++k)", steps)
    yield f"for (int i = 0; i < {entries}; ++i) g[i] = dm[i];"
    steps = ["undo_rows(g, m, by_row[k]);", "undo_columns(g, m, by_column[k]);"]
    yield from block(f"for (int k = {iters} - 1; k > 0; --k)", steps)
    yield from each(n, "i", first_rows)
    yield from each(n, "j", first_columns)


def dot(line: list[str], other: str) -> str:
    """The sum of ``g`` times ``other`` over the entries of a line."""
    return total(f"g[{k}] * {other}[{k}]" for k in line)
