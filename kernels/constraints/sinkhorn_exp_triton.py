"""The Triton lines of "sinkhorn_exp", unrolled over the n x n entries.

The backward is that of `sinkhorn_triton` in its loops, its spans and the few registers they need:
every step is made again from a matrix near to it. What goes back is the gradient itself, divided
by each step's divisors, as ``y = (x + added) / d`` has ``gx = (gy - d' sum(gy y)) / d`` wherever
eps stands.
"""

from mhc_compile.kernels.constraints.sinkhorn_exp_step import Step, step_of
from mhc_compile.kernels.constraints.sinkhorn_triton import (
    AGAIN,
    Lines,
    numbered_entries,
    repeat_steps,
    undo_spans,
    undo_steps,
)
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import assign, column, function, items, numbered, pack, row

_DIVIDE = "One step, and the sums before it."
_UNDO = "From gradients of y, and y, to those of x, and x."


def sinkhorn_exp_triton(spec: SiteSpec) -> str:
    """Definitions of ``matrix`` and ``matrix_backward``, see `Constraint.triton`.

    Args:
        spec: the site.
    """
    n, step = spec.streams, step_of(spec)
    columns, rows = [column(j, n) for j in range(n)], [row(i, n) for i in range(n)]
    h, g = numbered("h", n * n), numbered("g", n * n)
    undo = ["g", "m", "sums"]
    functions = (
        function("divide_columns", ["m"], _DIVIDE, _divide(columns, step)),
        function("divide_rows", ["m"], _DIVIDE, _divide(rows, step)),
        function("later_steps", ["m", "count"], "count times columns, then rows.", repeat_steps()),
        function("matrix", h, "H_res.", _matrix(h, spec.iters)),
        function("undo_columns", undo, _UNDO, _undo(columns, step)),
        function("undo_rows", undo, _UNDO, _undo(rows, step)),
        function("undo_steps", ["g", "base", "count"], AGAIN, undo_steps("g")),
        function("matrix_backward", [*g, *h], "Of the same steps.", _backward(g, h, spec.iters)),
    )
    title = f"# exp, then {spec.iters} times columns and rows, eps at: {spec.eps_at}.\n"
    return title + "\n\n".join(functions)


def _divide(lines: list[list[int]], step: Step) -> Lines:
    n, plus = len(lines), f" + {step.added!r}" * (step.added > 0.0)
    for i, line in enumerate(lines):
        yield from assign(f"s{i}", items("m", line))
    for i in range(n):
        yield f"inverse{i} = 1.0 / ({_divisor(f's{i}', step)})"
    entries = (f"(m[{k}]{plus}) * inverse{i}" for k, i in numbered_entries(lines))
    yield from pack("m =", entries)
    yield from pack("return m,", numbered("s", n))


def _undo(lines: list[list[int]], step: Step) -> Lines:
    minus = f" - {step.added!r}" * (step.added > 0.0)
    for i, line in enumerate(lines):
        yield f"d{i} = {_divisor(f'sums[{i}]', step)}"
        yield f"inverse{i} = 1.0 / d{i}"
        yield from assign(f"dot{i}", (f"g[{k}] * m[{k}]" for k in line))
        if step.floor:
            yield f"dot{i} = tl.where(sums[{i}] >= {step.floor!r}, dot{i}, 0.0)"
    entries = numbered_entries(lines)
    yield from pack("g =", (f"(g[{k}] - dot{i}) * inverse{i}" for k, i in entries))
    yield from pack("return g,", (f"m[{k}] * d{i}{minus}" for k, i in entries))


def _divisor(total: str, step: Step) -> str:
    if step.floor:  # not maximum, which drops a NaN
        return f"tl.where({total} < {step.floor!r}, {step.floor!r}, {total})"
    return f"{total} + {step.plus!r}" if step.plus else total


def _matrix(h: list[str], iters: int) -> Lines:
    yield from pack("start =", (f"tl.exp({x})" for x in h))
    yield f"return later_steps(start, {iters})"


def _backward(g: list[str], h: list[str], iters: int) -> Lines:
    yield from pack("start =", (f"tl.exp({x})" for x in h))
    yield from pack("g =", g)
    yield from undo_spans("g", "start", iters)
    yield from pack("return", (f"g[{k}] * start[{k}]" for k in range(len(h))))
