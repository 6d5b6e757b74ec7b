"""Triton's interpreter with bfloat16 as hardware has it.

The interpreter of triton 3.9 keeps a bf16 number as its bits in a uint16, truncates where it should
round to nearest even, and adds, multiplies, compares and sums the bits as if they were integers.
`enable` has conversions round, and products of matrices widen first. Any other arithmetic on bf16
is refused with an error: generated kernels convert to float32 when they load.

What it cannot show: ``num_warps`` and ``num_stages`` mean nothing here, ``tl.dot`` on float32 is
exact whatever its ``input_precision``, and programs run one after another.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle
_ARITHMETIC = (
    "binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf",
    "create_atomic_rmw",
)  # fmt: skip


def bf16_to_fp32(bits: Any) -> Any:
    """Widen bf16 bits (uint16) to float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: Any) -> Any:
    """Round float32 to bf16 bits (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # NaN must not round to infinity
    kept = np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)
    return kept.reshape(np.shape(values))


def enable() -> None:
    """Put bf16 right in this process.

    Raises:
        RuntimeError: this process compiles; TRITON_INTERPRET was not set when it began.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before the process starts: triton reads it once")
    _round_conversions()
    for name in _ARITHMETIC:
        setattr(Builder, name, _refusing(getattr(Builder, name), name))
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = _refusing(kind.apply_impl, kind.__name__)
    stock_dot = Builder.create_dot
    Builder.create_dot = lambda self, a, b, *rest: stock_dot(self, _widened(a), _widened(b), *rest)


def _round_conversions() -> None:
    def converting(stock: Callable[..., Any]) -> Callable[..., Any]:
        def convert(self: Any, source: Any, kind: Any, *rounding: Any) -> Any:
            before, after = source.dtype.scalar, kind.scalar
            if before == after or tl.bfloat16 not in (before, after):
                return stock(self, source, kind, *rounding)
            if before == tl.bfloat16:
                wide = _widened(source)
                return wide if after == tl.float32 else stock(self, wide, kind, *rounding)
            return Handle(fp32_to_bf16(source.data.astype(np.float32)), tl.bfloat16)

        return convert

    Builder.cast_impl = converting(Builder.cast_impl)
    Builder.create_fp_to_fp = converting(Builder.create_fp_to_fp)


def _refusing(stock: Callable[..., Any], name: str) -> Callable[..., Any]:
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        operands = args[0] if args and isinstance(args[0], tuple) else args
        if any(_is_bf16(getattr(value, "handle", value)) for value in operands):
            raise NotImplementedError(f"{name} on bf16: convert to float32 first")
        return stock(self, *args, **kwargs)

    return operation


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return Handle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle
