"""Small kernels for the tests of the tools: sound ones, and one for each mistake."""

import triton
import triton.language as tl


@triton.jit
def copy(x, y, size, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def cast(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def dot_bf16(x, y, out):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


@triton.jit
def arithmetic_in_bf16(x, y, out, KIND: tl.constexpr, B: tl.constexpr):
    at = tl.arange(0, B)
    a, b = tl.load(x + at), tl.load(y + at)
    if KIND == "add":
        tl.store(out + at, a + b)
    elif KIND == "negate":
        tl.store(out + at, -a)
    elif KIND == "compare":
        tl.store(out + at, tl.where(a > b, a, b))
    else:
        tl.store(out, tl.sum(a, 0))


@triton.jit
def two_passes_over_a_shared_row(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    total = tl.sum(tl.load(x + at), 0)
    tl.store(y + tl.program_id(0) * B + at, tl.load(x + at) / total)


@triton.jit
def overlapping(x, y, B: tl.constexpr):
    at = tl.program_id(0) * (B // 2) + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def reading_back(x, y, out, FENCE: tl.constexpr, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at))
    if FENCE:
        tl.debug_barrier()
    tl.store(out + at, tl.load(y + (B - 1 - at)))


@triton.jit
def accumulate(x, total, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(total, tl.sum(tl.load(x + at), 0))


@triton.jit
def narrow_copy(x, y, width, B: tl.constexpr):
    """The width of a row is an ordinary argument, so no access is known to be aligned."""
    at = tl.arange(0, B)
    row = tl.program_id(0) * width
    tl.store(y + row + at, tl.load(x + row + at, mask=at < width), mask=at < width)


@triton.jit
def many_at_once(x, y, B: tl.constexpr):
    """Everything is loaded before anything is stored."""
    at = tl.arange(0, B)
    a = tl.load(x + at)
    b = tl.load(x + B + at)
    tl.debug_barrier()
    tl.store(y + at, a * b)
    tl.store(y + B + at, a - b)
