"""From a site's specification to its C++ source: pure functions of strings.

What depends on the site is generated here: constants, gates, the constraint's own lines, and the
mixing of the streams, unrolled over n. It is put between the loops that do not depend on it, which
stand in the ``.hpp`` files beside this module. Numbers in parentheses are equations of arXiv
2512.24880.
"""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.text import function, literal, row, total
from mhc_compile.kernels.spec import SiteSpec

STREAM_TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
"""The dtypes that streams can have, and their names in the source."""

_SHARED = ("lanes", "projection", "coefficients", "pre", "post", "seam", "ends")
_ACCUMULATORS = 24
"""Dot products that a pass over a token's channels keeps in registers."""
_STEP = "[&](long c, auto at) ALWAYS_INLINE"


@cache
def source(spec: SiteSpec, dtype: torch.dtype) -> str:
    """The whole translation unit for the ops of one site.

    Args:
        spec: the site; its ``dim`` and ``kernels`` do not matter.
        dtype: of the streams, one of `STREAM_TYPES`.

    Returns:
        C++17 that defines ``mhc_pre``, ``mhc_pre_backward``, ``mhc_post``, ``mhc_post_backward``,
        ``mhc_collapse`` and the two ``..._workspace``, with C linkage.
    """
    lanes, *loops = (_shared_text(name) for name in _SHARED)
    return "\n".join((lanes, site_source(spec, dtype), *loops))


def site_source(spec: SiteSpec, dtype: torch.dtype) -> str:
    """The generated part of `source` alone."""
    parts = (
        _constants(spec, dtype),
        _gates(spec),
        constraint_of(spec).cpp(spec),
        _read_streams(spec.streams),
        _write_streams(spec),
        _write_streams_backward(spec),
        _sum_streams(spec.streams),
    )
    return "\n".join(parts)


@cache
def _shared_text(name: str) -> str:
    return (files("mhc_compile.kernels.cpp") / f"{name}.hpp").read_text()


def _constants(spec: SiteSpec, dtype: torch.dtype) -> str:
    constraint, n = constraint_of(spec), spec.streams
    k = constraint.logits(n)
    norms = n if constraint.per_stream else 1
    return f"""\
// Site: {spec.streams} streams, constraint {spec.constraint}.
typedef {STREAM_TYPES[dtype]} stream_t;
constexpr int N = {n};  // streams
constexpr int M = {2 * n + k};  // logits: pre {n}, post {n}, res {k}
constexpr int S = {norms};  // norms, and projected rows, per token
constexpr bool SITE = true;  // has H_post and H_res
constexpr int GROUPS = 3;
constexpr bool MIXES = {"true" if constraint.mixes else "false"};
constexpr float NORM_EPS = {literal(spec.norm_eps)};
"""


def _gates(spec: SiteSpec) -> str:
    eps = f" + {literal(spec.pre_eps)}" if spec.pre_eps else ""
    if constraint_of(spec).gate == "tanh":
        return f"""\
// H = alpha tanh(z / r) + b, arXiv 2409.19606.
INLINE vec bounded(vec hidden) {{ return tanh(hidden); }}
INLINE vec bounded_backward(vec g, vec bounded) {{ return g * (1.0f - bounded * bounded); }}
INLINE vec pre_gate(vec h) {{ return h{eps}; }}
INLINE vec pre_gate_backward(vec g, vec) {{ return g; }}
INLINE vec post_gate(vec h) {{ return h; }}
INLINE vec post_gate_backward(vec g, vec) {{ return g; }}
"""
    return f"""\
INLINE vec bounded(vec hidden) {{ return hidden; }}
INLINE vec bounded_backward(vec g, vec) {{ return g; }}
// (17): H_pre = sigmoid(h).
INLINE vec pre_gate(vec h) {{ return sigmoid(h){eps}; }}
INLINE vec pre_gate_backward(vec g, vec h) {{
  const vec s = sigmoid(h);
  return g * (s * (1.0f - s));
}}
// (18): H_post = 2 sigmoid(h).
INLINE vec post_gate(vec h) {{ return 2.0f * sigmoid(h); }}
INLINE vec post_gate_backward(vec g, vec h) {{
  const vec s = sigmoid(h);
  return g * (2.0f * s * (1.0f - s));
}}
"""


def _read_streams(n: int) -> str:
    mixed = total(f"w[{i}] * load(x + {i} * padded + c)" for i in range(n))
    text = function(
        "read_streams(const float* x, long padded, const float* w, stream_t* u, long channels)",
        [f"for_channels(channels, false, {_STEP} {{", f"  at.put(u + c, {mixed});", "});"],
    )
    return f"// u = sum_i H_pre[i] X_i.\n{text}"


def _sum_streams(n: int) -> str:
    terms = total(f"at.get(x + {i} * channels + c)" for i in range(n))
    text = function(
        "sum_streams(const stream_t* x, float divisor, stream_t* out, long channels)",
        [
            f"for_channels(channels, false, {_STEP} {{",
            f"  at.put(out + c, ({terms}) / divisor);",
            "});",
        ],
    )
    return f"// The collapse: sum_i X_i, over n for a mean.\n{text}"


def _write_streams(spec: SiteSpec) -> str:
    n, mixes = spec.streams, constraint_of(spec).mixes

    def body() -> Iterator[str]:
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield "  const vec fc = at.get_next(f + c, channels);"
        yield from (
            f"  const vec x{j} = at.get_next(x + {j} * channels + c, {n} * channels);"
            for j in range(n)
        )
        for i in range(n):
            carried = [f"r[{k}] * x{j}" for j, k in enumerate(row(i, n))] if mixes else [f"x{i}"]
            yield f"  put(c, at, {i}, {total([*carried, f'p[{i}] * fc'])});"
        yield "});"

    head = (
        "write_streams(const stream_t* x, const stream_t* f, const float* p, const float* r, "
        "long channels, bool streamed, Put put)"
    )
    return (
        "// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, handed to `put`.\n"
        f"template <typename Put>\n{function(head, body())}"
    )


def _write_streams_backward(spec: SiteSpec) -> str:
    n, mixes = spec.streams, constraint_of(spec).mixes
    dots_per_row = n + 1 if mixes else 1
    at_once = max(1, _ACCUMULATORS // dots_per_row)
    first_post = n * n if mixes else 0  # dots: H_res row-major, then H_post

    def one_pass(rows: range) -> Iterator[str]:
        first = rows[0] == 0
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield "  const vec fc = at.get_next(f + c, channels);"
        # The first pass has all gradients at hand, and so writes those of X and f.
        needed = range(n) if first else rows
        yield from (
            f"  const vec g{i} = at.get_next(g + {i} * g_stride + c, {n} * g_stride);"
            for i in needed
        )
        if mixes:
            yield from (
                f"  const vec x{j} = at.get_next(x + {j} * channels + c, {n} * channels);"
                for j in range(n)
            )
        if first:
            for j in range(n):
                terms = [f"r[{i * n + j}] * g{i}" for i in range(n)] if mixes else [f"g{j}"]
                yield f"  at.put_far(dx + {j} * channels + c, {total(terms)});"
            yield f"  at.put(df + c, {total(f'p[{i}] * g{i}' for i in range(n))});"
        for i in rows:
            if mixes:
                yield from (f"  dots[{i * n + j}] += g{i} * x{j};" for j in range(n))
            yield f"  dots[{first_post + i}] += g{i} * fc;"
        yield "});"

    def body() -> Iterator[str]:
        for start in range(0, n, at_once):
            yield from one_pass(range(start, min(start + at_once, n)))

    head = (
        "write_streams_backward(const G* g, long g_stride, const stream_t* x, const stream_t* f, "
        "const float* p, const float* r, stream_t* dx, stream_t* df, vec* dots, long channels, "
        "bool streamed)"
    )
    comment = (
        "// dX_j = sum_i H_res[i, j] dX'_i; df = sum_i H_post[i] dX'_i; the products of dX'_i with "
        "X_j\n// and f, whose sums over the channels are the gradients of H_res and H_post.\n"
        "template <typename G>\n"
    )
    return comment + function(head, body())
