"""Text of the kernels at the end of a trunk, and of a sum over the rows of a matrix."""

from collections.abc import Iterator

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_post import block_of_one_token, load_streams
from mhc_compile.kernels.triton.text import Kernel, assign, loop


def end_kernels(spec: SiteSpec) -> list[Kernel]:
    """``collapse_mean``, ``collapse_sum`` and ``sum_rows``."""
    return [_collapse(spec, "mean"), _collapse(spec, "sum"), _sum_rows()]


def _collapse(spec: SiteSpec, mode: str) -> Kernel:
    n = spec.streams

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "X + row", "x")
        yield from assign("out", [f"x{i}" for i in range(n)])
        value = f"out / {n}" if mode == "mean" else "out"
        yield f"tl.store(OUT + t * C + c, {value}, mask=live)"

    over = " / n" if mode == "mean" else ""
    return Kernel(
        name=f"collapse_{mode}",
        comment=f"sum_i X_i{over}. One token, BC channels a program.",
        streams=("X", "OUT"),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def _sum_rows() -> Kernel:
    step = (
        "row = tl.arange(0, BR).to(tl.int64) + start",
        "live = (row < last)[:, None] & inside[None, :]",
        "total += read(FROM + row[:, None] * COLUMNS + column[None, :], live)",
    )
    body = (
        "column = tl.program_id(0) * BK + tl.arange(0, BK)",
        "inside = column < COLUMNS",
        "first = tl.program_id(1) * SPAN",
        "last = tl.minimum(first + SPAN, ROWS)",
        "total = tl.zeros([BR, BK], tl.float32)",
        *loop("for start in range(first, last, BR)", step),
        "to = TO + tl.program_id(1).to(tl.int64) * COLUMNS + column",
        "tl.store(to, tl.sum(total, 0), mask=inside)",
    )
    return Kernel(
        name="sum_rows",
        comment="Each program adds SPAN rows of BK columns, always in the same order.",
        streams=(),
        floats=("FROM", "TO"),
        integers=("ROWS", "COLUMNS"),
        constants=("SPAN", "BR", "BK"),
        body=body,
    )
