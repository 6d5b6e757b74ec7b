"""The Triton lines of the two Sinkhorn constraints, unrolled over the n x n entries.

Going back, ``a`` stands for the entries of a matrix times their gradients. A step
``y = x / (sum(x) + eps)`` has the gradient ``gx = (gy - sum(gy y)) / (sum(x) + eps)``, and so
``a_x = a_y - y sum(a_y)``: there is no division, and before the exponential ``a`` is the gradient
itself. The matrix before a step is the one after it times that step's divisors.

The divisors of all iterations would not fit a thread's registers, and memory is what the kernels
save. So each step's are computed again, in loops that need few registers and little code (what
Triton compiles slowly is straight code): iterations are undone in spans of about the square root of
their number, from a matrix kept at the begin of the span. Twenty iterations cost a hundred.
"""

import math
from collections.abc import Iterator

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import (
    assign,
    column,
    function,
    items,
    largest,
    loop,
    numbered,
    pack,
    row,
)

Lines = Iterator[str]
Indices = list[list[int]]
_FIRST = "A softmax over columns, the same number as exp and the column step, then the row step."
_UNDO = "From entries of y = x / sum(x) times their gradients to those of x; and x."
AGAIN = "The divisors of one step after the other, made again from the matrix ``base``."


def sinkhorn_triton(spec: SiteSpec, start_eps: bool) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.triton`.

    Args:
        spec: the site.
        start_eps: whether eps is also added after the first column step.
    """
    n, eps = spec.streams, spec.sinkhorn_eps
    columns, rows = [column(j, n) for j in range(n)], [row(i, n) for i in range(n)]
    added = eps if start_eps else 0.0
    h, g = numbered("h", n * n), numbered("g", n * n)
    functions = (
        function(
            "divide_columns", ["m"], "Columns over their sums, and these.", _divide(columns, eps)
        ),
        function("divide_rows", ["m"], "Rows over their sums, and these.", _divide(rows, eps)),
        function("first_steps", ["h"], _FIRST, _first_steps(columns, rows, eps, added)),
        function("later_steps", ["m", "count"], "count times columns, then rows.", repeat_steps()),
        function("matrix", h, "H_res.", _matrix(h, spec.iters - 1)),
        function("undo_columns", ["a", "m", "divisors"], _UNDO, _undo(columns)),
        function("undo_rows", ["a", "m", "divisors"], _UNDO, _undo(rows)),
        function("undo_steps", ["a", "base", "count"], AGAIN, undo_steps("a")),
        function(
            "undo_first", ["a", "m", "start"], "To the logits.", _undo_first(columns, rows, added)
        ),
        function(
            "matrix_backward", [*g, *h], "Of the same steps.", _backward(h, n, spec.iters - 1)
        ),
    )
    title = f"# (19): exp, then {spec.iters} times columns and rows divided by their sums.\n"
    return title + "\n\n".join(functions)


def _divide(lines: Indices, eps: float) -> Lines:
    n, plus = len(lines), [repr(eps)] * (eps > 0.0)
    for i, line in enumerate(lines):
        yield from assign(f"d{i}", [*items("m", line), *plus])
    for i in range(n):
        yield f"inverse{i} = 1.0 / d{i}"
    yield from pack("m =", (f"m[{k}] * inverse{i}" for k, i in numbered_entries(lines)))
    yield from pack("return m,", numbered("d", n))


def _first_steps(columns: Indices, rows: Indices, eps: float, added: float) -> Lines:
    n = len(rows)
    for j, line in enumerate(columns):
        yield f"top{j} = {largest(items('h', line))}"
        yield from (f"e{k} = tl.exp(h[{k}] - top{j})" for k in line)
        yield f"column{j} = 1.0 / ({' + '.join(f'e{k}' for k in line)})"
    yield from pack("start =", (f"e{k} * column{j}" for k, j in numbered_entries(columns)))
    if eps == 0.0:
        yield "# Relative to the row's maximum, too: a whole row may be far below its columns'."
        for i, line in enumerate(rows):
            yield f"high{i} = {largest([f'h[{k}] - top{j}' for j, k in enumerate(line)])}"
        scaled = (
            f"tl.exp(h[{k}] - top{k % n} - high{i}) * column{k % n}"
            for k, i in numbered_entries(rows)
        )
        yield from pack("m =", scaled)
    elif added:
        yield from pack("m =", (f"start[{k}] + {added!r}" for k in range(n * n)))
    else:
        yield "m = start"
    yield "m, divisors = divide_rows(m)"
    yield "return start, m"


def repeat_steps() -> Lines:
    """The body of ``later_steps(m, count)``."""
    steps = ["m, by_column = divide_columns(m)", "m, by_row = divide_rows(m)"]
    yield from loop("for _ in range(count)", steps)
    yield "return m"


def _matrix(h: list[str], later: int) -> Lines:
    yield from pack("h =", h)
    yield "start, m = first_steps(h)"
    yield f"return later_steps(m, {later})"


def _undo(lines: Indices) -> Lines:
    for i, line in enumerate(lines):
        yield from assign(f"s{i}", items("a", line))
    yield from pack("a =", (f"a[{k}] - m[{k}] * s{i}" for k, i in numbered_entries(lines)))
    yield from pack("return a,", (f"m[{k}] * divisors[{i}]" for k, i in numbered_entries(lines)))


def undo_steps(back: str) -> Lines:
    """The body of ``undo_steps(back, base, count)``; ``back`` names what goes back."""
    yield "for k in range(count):"
    yield "    m = later_steps(base, count - 1 - k)"
    yield "    m, by_column = divide_columns(m)"
    yield "    m, by_row = divide_rows(m)"
    yield f"    {back}, m = undo_rows({back}, m, by_row)"
    yield f"    {back}, m = undo_columns({back}, m, by_column)"
    yield f"return {back}"


def undo_spans(back: str, first: str, count: int) -> Lines:
    """Undo ``count`` iterations that began at the matrix ``first``, a span at a time."""
    span = math.isqrt(count - 1) + 1
    yield f"for span in range({-(-count // span)}):"
    yield f"    end = {count} - {span} * span"
    yield f"    begin = tl.maximum(end - {span}, 0)"
    yield f"    {back} = undo_steps({back}, later_steps({first}, begin), end - begin)"


def _undo_first(columns: Indices, rows: Indices, added: float) -> Lines:
    for i, line in enumerate(rows):
        yield from assign(f"row{i}", items("a", line))
    for k, i in numbered_entries(rows):
        yield f"a{k} = a[{k}] - m[{k}] * row{i}"
    if added:  # from the entries of start + eps to those of start
        for k, _ in numbered_entries(rows):
            yield f"a{k} *= start[{k}] / (start[{k}] + {added!r})"
    for j, line in enumerate(columns):
        yield from assign(f"column{j}", (f"a{k}" for k in line))
    yield from pack(
        "return", (f"a{k} - start[{k}] * column{j}" for k, j in numbered_entries(columns))
    )


def _backward(h: list[str], n: int, later: int) -> Lines:
    yield from pack("h =", h)
    yield "start, first = first_steps(h)"
    yield f"m = later_steps(first, {later})"
    yield from pack("a =", (f"g{k} * m[{k}]" for k in range(n * n)))
    if later:
        yield from undo_spans("a", "first", later)
    yield "return undo_first(a, first, start)"


def numbered_entries(lines: Indices) -> list[tuple[int, int]]:
    """The flat index of every entry, in order, with the number of the line that it is in."""
    return sorted((k, i) for i, line in enumerate(lines) for k in line)
