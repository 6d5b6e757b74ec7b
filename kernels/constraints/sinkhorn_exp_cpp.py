"""The C++ lines of "sinkhorn_exp", unrolled over the n x n entries.

Going back, the sums of all steps are kept on the stack, and the matrix before a step is made again
from the one after it. Where eps is added to the entries that subtracts eps and multiplies the error
by the divisor, 1.4 at four streams and eps = 0.1, a step: there the matrices are kept too, one an
iteration.
"""

from mhc_compile.kernels.constraints.sinkhorn_cpp import Indices, Lines, dot
from mhc_compile.kernels.constraints.sinkhorn_exp_step import Step, step_of
from mhc_compile.kernels.cpp.text import block, column, each, function, items, literal, row, total
from mhc_compile.kernels.spec import SiteSpec


def sinkhorn_exp_cpp(spec: SiteSpec) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.cpp`.

    Args:
        spec: the site.
    """
    n, step = spec.streams, step_of(spec)
    divide, undo = "vec* m, vec* sums", "vec* g, vec* m, const vec* sums"
    functions = (
        function("exponentials(const vec* h, vec* start)", _exponentials(n)),
        function(f"divide_columns({divide})", _divide(column, n, step)),
        function(f"divide_rows({divide})", _divide(row, n, step)),
        function(f"undo_columns({undo})", _undo(column, n, step)),
        function(f"undo_rows({undo})", _undo(row, n, step)),
        function("matrix(const vec* h, vec* out)", _matrix(spec)),
        function("matrix_backward(const vec* dm, const vec* h, vec* dh)", _backward(spec, step)),
    )
    title = f"// exp, then {spec.iters} times columns and rows, eps at: {spec.eps_at}.\n"
    return title + "".join(functions)


def _exponentials(n: int) -> Lines:
    yield "// exp saturates. Its square overflows, as the formula does, and is seen."
    body = ["const vec root = exp(0.5f * h[i]);", "start[i] = root * root;"]
    yield from block(f"for (int i = 0; i < {n * n}; ++i)", body)


def _divide(line: Indices, n: int, step: Step) -> Lines:
    """The step along each line; the sums are written down."""

    def sums(i: str) -> Lines:
        yield f"sums[{i}] = {total(items('m', line(i, n)))};"

    def quotients(i: str) -> Lines:
        yield f"const vec inverse{i} = 1.0f / ({_divisor(i, step)});"
        plus = f" + {literal(step.added)}" if step.added else ""
        yield " ".join(f"m[{k}] = (m[{k}]{plus}) * inverse{i};" for k in line(i, n))

    yield from each(n, "i", sums)
    yield from each(n, "i", quotients)


def _undo(line: Indices, n: int, step: Step) -> Lines:
    """``g = (g - sum(g m)) / divisor`` along each line, and the m before the step."""

    def undo(i: str) -> Lines:
        yield f"const vec divisor{i} = {_divisor(i, step)}, inverse{i} = 1.0f / divisor{i};"
        yield f"vec dot{i} = {dot(line(i, n), 'm')};"
        if step.floor:
            yield f"dot{i} = sums[{i}] >= splat({literal(step.floor)}) ? dot{i} : vec{{}};"
        yield from (f"g[{k}] = (g[{k}] - dot{i}) * inverse{i};" for k in line(i, n))
        minus = f" - {literal(step.added)}" if step.added else ""
        yield " ".join(f"m[{k}] = m[{k}] * divisor{i}{minus};" for k in line(i, n))

    yield from each(n, "i", undo)


def _divisor(i: str, step: Step) -> str:
    if step.floor:  # in this order a NaN stays one
        return f"max(splat({literal(step.floor)}), sums[{i}])"
    return f"sums[{i}] + {literal(step.plus)}" if step.plus else f"sums[{i}]"


def _matrix(spec: SiteSpec) -> Lines:
    yield f"vec sums[{spec.streams}];"
    yield "exponentials(h, out);"
    steps = ["divide_columns(out, sums);", "divide_rows(out, sums);"]
    yield from block(f"for (int k = 0; k < {spec.iters}; ++k)", steps)


def _backward(spec: SiteSpec, step: Step) -> Lines:
    n, iters, entries = spec.streams, spec.iters, spec.streams * spec.streams
    every = f"for (int i = 0; i < {entries}; ++i)"
    yield f"vec m[{entries}], g[{entries}], start[{entries}];"
    yield f"vec by_column[{iters}][{n}], by_row[{iters}][{n}];"
    if step.added:
        yield f"vec before[{iters}][{entries}];"
    yield "exponentials(h, start);"
    yield f"{every} m[i] = start[i], g[i] = dm[i];"
    steps = ["divide_columns(m, by_column[k]);", "divide_rows(m, by_row[k]);"]
    keep = [f"{every} before[k][i] = m[i];"] if step.added else []
    yield from block(f"for (int k = 0; k < {iters}; ++k)", keep + steps)
    steps = ["undo_rows(g, m, by_row[k]);", "undo_columns(g, m, by_column[k]);"]
    restore = [f"{every} m[i] = before[k][i];"] if step.added else []
    yield from block(f"for (int k = {iters} - 1; k >= 0; --k)", steps + restore)
    yield f"{every} dh[i] = g[i] * start[i];"
