"""Text of the kernels of ``mhc::sinkhorn``: H_res alone, from logits, one token a thread.

They hold nothing of Sinkhorn's, and so serve every constraint that mixes.
"""

from collections.abc import Iterator
from functools import cache

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import Kernel, call, numbered
from mhc_compile.kernels.triton.tiles import Tile

TILE = Tile(constants={"BT": 64}, warps=2)
"""Tokens of a program: a thread has registers for one."""


@cache
def matrix_source(spec: SiteSpec) -> str:
    """The module that holds the kernels of `matrix_kernels`, for logits of any dtype."""
    texts = (constraint_of(spec).triton(spec), *(kernel.text() for kernel in matrix_kernels(spec)))
    return "\n\n".join((_head(spec), *texts))


def matrix_kernels(spec: SiteSpec) -> list[Kernel]:
    """``make_matrix`` and ``make_matrix_backward``, both computed in float32."""
    return [
        Kernel(
            name="make_matrix",
            comment="H_res from logits, as (19). BT tokens a program, each a row of both.",
            streams=("LOGITS", "OUT"),
            integers=("tokens",),
            constants=("BT",),
            body=tuple(_forward(spec)),
        ),
        Kernel(
            name="make_matrix_backward",
            comment="Gradient of the logits; the steps are computed again.",
            streams=("G", "LOGITS", "OUT"),
            integers=("tokens",),
            constants=("BT",),
            body=tuple(_backward(spec)),
        ),
    ]


def _head(spec: SiteSpec) -> str:
    return f'''\
"""mHC kernels, generated: H_res of {spec.streams} streams, {spec.constraint}."""

import triton
import triton.language as tl
'''


def _forward(spec: SiteSpec) -> Iterator[str]:
    logits, entries = _sizes(spec)
    yield from _tokens()
    yield from _load("h", "LOGITS", logits)
    yield from call("m = matrix", numbered("h", logits))
    yield from _store("m", entries)


def _backward(spec: SiteSpec) -> Iterator[str]:
    logits, entries = _sizes(spec)
    yield from _tokens()
    yield from _load("h", "LOGITS", logits)
    yield from _load("g", "G", entries)
    yield from call("d = matrix_backward", [*numbered("g", entries), *numbered("h", logits)])
    yield from _store("d", logits)


def _sizes(spec: SiteSpec) -> tuple[int, int]:
    return constraint_of(spec).logits(spec.streams), spec.streams * spec.streams


def _tokens() -> Iterator[str]:
    yield "t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)"
    yield "live = t < tokens"


def _load(name: str, base: str, count: int) -> Iterator[str]:
    for k in range(count):
        at = f"{base} + t * {count} + {k}"
        yield f"{name}{k} = tl.load({at}, mask=live, other=0.0).to(tl.float32)"


def _store(name: str, count: int) -> Iterator[str]:
    yield from (f"tl.store(OUT + t * {count} + {k}, {name}[{k}], mask=live)" for k in range(count))
