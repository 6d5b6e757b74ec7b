"""From a site's specification to its C++ source: pure functions of strings.

What depends on the site is generated here: constants, gates, the constraint's own lines, and the
mixing of the streams, unrolled over n. It is put between the loops that do not depend on it, which
stand in the ``.hpp`` files beside this module. Numbers in parentheses are equations of arXiv
2512.24880.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Literal

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.text import (
    UNROLLED,
    block,
    column,
    each,
    function,
    literal,
    row,
    total,
)
from mhc_compile.kernels.layout import dz_width
from mhc_compile.kernels.spec import REPLAYED, SiteSpec

STREAM_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
"""The dtypes that streams can have, and their names in the source."""

Part = Literal["site", "normed", "mix", "replay", "head", "ends", "sinkhorn"]
"""What a library is for: pre, post and seam of a site (of a static one post alone); the seam of a
dynamic one with the norm of its branch; H_res X alone; several dynamic sites at once; a dynamic
learned collapse; sums of the streams with the same weights for all tokens; Sinkhorn alone."""

_LOOPS: dict[Part, tuple[str, ...]] = {
    "site": ("projection", "coefficients", "weights", "pre", "post", "seam", "seam_plain", "phi"),
    "normed": ("projection", "coefficients", "weights", "post", "seam", "seam_norm"),
    "mix": ("mix",),
    "replay": ("weights", "replay"),
    "head": ("projection", "coefficients", "pre"),
    "ends": ("ends",),
    "sinkhorn": ("sinkhorn",),
}
_ACCUMULATORS = 24
"""Dot products that a pass over a token's channels keeps in registers."""
Lines = Iterator[str]
_STEP = "[&](long c, auto at) ALWAYS_INLINE"


@cache
def source(spec: SiteSpec, dtype: torch.dtype, part: Part = "site") -> str:
    """The whole translation unit for some ops of one site.

    Args:
        spec: the site; its ``dim`` and ``kernels`` do not matter.
        dtype: of the streams, one of `STREAM_TYPES`.
        part: which ops.

    Returns:
        C++17 that defines ``mhc_<op>``, ``mhc_<op>_backward`` and what workspace they need,
        ``mhc_<op>_workspace``, with C linkage.
    """
    names = _LOOPS[part] if spec.dynamic or part != "site" else ("post",)
    return "\n".join(
        (_shared_text("lanes"), site_source(spec, dtype, part), *map(_shared_text, names))
    )


def site_source(spec: SiteSpec, dtype: torch.dtype, part: Part = "site") -> str:
    """The generated part of `source` alone."""
    n = spec.streams
    texts: tuple[str, ...]
    if part == "ends":
        apart = spec.gates if spec.single_pass and spec.dynamic else 0
        weights = f"constexpr long WEIGHTS = {apart};\n"
        texts = (_streams(n, dtype), weights, _read_streams(n), _sum_streams(n))
    elif part == "sinkhorn":
        texts = (_streams(n, dtype), constraint_of(spec).cpp(spec))
    elif part == "head":
        head = replace(spec, constraint="identity")
        matrix = constraint_of(head).cpp(head)
        texts = (_streams(n, dtype), _head(spec), _gates(head), matrix, _read_streams(n))
    elif part == "mix":
        texts = (_streams(n, dtype), _site(spec), _mix_streams(n))
    elif part == "replay":
        texts = (_streams(n, dtype), _site(spec), _chunk(), _gates(spec), _replay_streams(spec))
    else:
        writes = (_write_streams(spec), _write_streams_backward(spec))
        matrix = constraint_of(spec).cpp(spec)
        reads = (_gates(spec), matrix, _read_streams(n)) if spec.dynamic else ()
        norm = (_branch_norm(spec),) if part == "normed" else ()
        texts = (_streams(n, dtype), _site(spec), *norm, *reads, *writes)
    return "\n".join(texts)


@cache
def _shared_text(name: str) -> str:
    return (files("mhc_compile.kernels.cpp") / f"{name}.hpp").read_text()


def _streams(n: int, dtype: torch.dtype) -> str:
    return f"typedef {STREAM_TYPES[dtype]} stream_t;\nconstexpr int N = {n};  // streams\n"


def _site(spec: SiteSpec) -> str:
    constraint, n = constraint_of(spec), spec.streams
    k, norms = constraint.logits(n), n if constraint.per_stream else 1
    before = "H_pre and " if spec.single_pass else ""
    mixes = f"""\
constexpr bool MIXES = {_flag(constraint.mixes)};
constexpr int GATES = {spec.gates};  // numbers of a token in h_post: {before}H_post
"""
    if not spec.dynamic:
        return f"""\
// Static site with constraint {spec.constraint}.
constexpr bool DYNAMIC = false;
{mixes}"""
    return f"""\
// Site with constraint {spec.constraint}.
constexpr bool SITE = true, DYNAMIC = true;
constexpr int M = {2 * n + k};  // logits: pre {n}, post {n}, res {k}
constexpr int GROUPS = 3;  // scales of logits
constexpr int S = {norms};  // norms, and projected rows, per token
constexpr int WORK = {dz_width(2 * n + k + norms, n)};  // stride of dz
{mixes}constexpr float NORM_EPS = {literal(spec.norm_eps)};
"""


def _branch_norm(spec: SiteSpec) -> str:
    return f"""\
// The branch starts with a norm: {spec.branch_norm}.
constexpr bool CENTRED = {_flag(spec.branch_norm == "layer")};
constexpr bool ROUNDS = {_flag(spec.branch_rounds)};  // before the weight is applied
constexpr float BRANCH_EPS = {literal(spec.branch_eps)};
"""


def _head(spec: SiteSpec) -> str:
    return f"""\
// Learned collapse: H_pre alone.
constexpr bool SITE = false, MIXES = false;
constexpr int M = N, GROUPS = 1, S = 1, GATES = N;  // logits, their scales, norms per token
constexpr int WORK = N;  // stride of dz, which a head never leaves for later
constexpr float NORM_EPS = {literal(spec.norm_eps)};
"""


def _flag(value: bool) -> str:
    return "true" if value else "false"


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
    mixed = total(f"w[{i}] * at.get(x + {i} * padded + c)" for i in range(n))
    text = function(
        "read_streams(const T* x, long padded, const float* w, stream_t* u, long channels)",
        [f"for_channels(channels, false, {_STEP} {{", f"  at.put(u + c, {mixed});", "});"],
    )
    return f"// u = sum_i H_pre[i] X_i.\ntemplate <typename T>\n{text}"


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


def _mixed(i: str, n: int) -> list[str]:
    """Terms of (H_res X)_i."""
    return [f"r[{k}] * x[{j}]" for j, k in enumerate(row(i, n))]


def _write_streams(spec: SiteSpec) -> str:
    n, mixes = spec.streams, constraint_of(spec).mixes

    def write(i: str) -> Lines:
        carried = _mixed(i, n) if mixes else [f"x[{i}]"]
        yield f"  put(c, at, {i}, {total([*carried, f'p[{i}] * fc'])});"

    def body() -> Lines:
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield "  const vec fc = at.get_next(f + c, channels);"
        yield from _load_streams("x", "X", "channels", range(n), n)
        yield from each(n, "i", write)
        yield "});"

    head = (
        "write_streams(const stream_t* X, const stream_t* f, const float* p, const float* r, "
        "long channels, bool streamed, Put put)"
    )
    return (
        "// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, handed to `put`.\n"
        f"template <typename Put>\n{function(head, body())}"
    )


def _mix_streams(n: int) -> str:
    def write(i: str) -> Lines:
        yield f"  at.put_far(mixed + {i} * channels + c, {total(_mixed(i, n))});"

    def body() -> Lines:
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield from _load_streams("x", "X", "channels", range(n), n)
        yield from each(n, "i", write)
        yield "});"

    head = (
        "mix_streams(const stream_t* X, const float* r, stream_t* mixed, long channels, "
        "bool streamed)"
    )
    return f"// M_i = sum_j H_res[i, j] X_j.\n{function(head, body())}"


def _chunk() -> str:
    return f"""\
// The tensors of some sites. There is one read more than posts if the state before them is read.
constexpr int MOST_SITES = {REPLAYED};
struct Chunk {{
  int64_t posts, reads;
  const stream_t* f[MOST_SITES];
  const float *h_post[MOST_SITES], *h_res[MOST_SITES];
  stream_t* states[MOST_SITES];
  const float *saved[MOST_SITES + 1], *bias[MOST_SITES + 1], *alpha[MOST_SITES + 1];
  stream_t* inputs[MOST_SITES + 1];
}};
"""


def _replay_streams(spec: SiteSpec) -> str:
    n, mixes = spec.streams, constraint_of(spec).mixes
    read = total(f"w[{i}] * x[{i}]" for i in range(n))

    def write(i: str) -> Lines:
        carried = _mixed(i, n) if mixes else [f"x[{i}]"]
        yield f"next[{i}] = {total([*carried, f'p[{i}] * fc'])};"
        yield f"at.put_far(y + {i} * channels + c, next[{i}]);"

    def site() -> Lines:
        yield "const vec fc = at.get_next(to.f[s] + c, channels);"
        yield "const float *const p = to.h_post[s], *const r = to.h_res[s];"
        yield "stream_t* const y = to.states[s];"
        yield f"vec next[{n}];"
        yield from each(n, "i", write)
        yield from each(n, "i", lambda i: [f"x[{i}] = rounded<stream_t>(next[{i}]);"])
        yield "read(s + first);"

    def step() -> Lines:
        yield f"vec x[{n}];"
        yield from each(
            n, "i", lambda i: [f"x[{i}] = at.get_next(X + {i} * channels + c, N * channels);"]
        )
        yield "const auto read = [&](int k) ALWAYS_INLINE {"
        yield "  const float* const w = weights[k];"
        yield f"  at.put(to.inputs[k] + c, {read});"
        yield "};"
        yield "if (first) read(0);"
        yield from block("for (int s = 0; s < to.posts; ++s)", site())

    head = (
        "replay_streams(const stream_t* X, const Chunk& to, const float* const* weights, "
        "long channels, bool streamed)"
    )
    body = [
        "const int first = int(to.reads - to.posts);",
        f"for_channels(channels, streamed, {_STEP} {{",
        *(f"  {line}" for line in step()),
        "});",
    ]
    comment = (
        "// X'_i = sum_j H_res[i, j] X_j + H_post[i] f, u = sum_i H_pre[i] X'_i, site by site.\n"
    )
    return comment + function(head, body)


def _load_streams(name: str, rows: str, stride: str, streams: range, n: int) -> Lines:
    yield f"  vec {name}[{n}];"
    yield from (
        f"  {name}[{i}] = at.get_next({rows} + {i} * {stride} + c, {n} * {stride});"
        for i in streams
    )


def _write_streams_backward(spec: SiteSpec) -> str:
    n, mixes = spec.streams, constraint_of(spec).mixes
    first_post = n * n if mixes else 0  # dots: H_res row-major, then H_post
    at_once = max(1, _ACCUMULATORS // (n + 1 if mixes else 1))

    def gradient(j: str) -> Lines:
        terms = [f"r[{k}] * g[{i}]" for i, k in enumerate(column(j, n))] if mixes else [f"g[{j}]"]
        yield f"  at.put_far(dx + {j} * channels + c, {total(terms)});"

    def gradients() -> Lines:
        yield from each(n, "j", gradient)
        yield f"  at.put(df + c, {total(f'p[{i}] * g[{i}]' for i in range(n))});"

    def dots(i: int) -> Lines:
        if mixes:
            yield from (f"  dots[{k}] += g[{i}] * x[{j}];" for j, k in enumerate(row(i, n)))
        yield f"  dots[{first_post + i}] += g[{i}] * fc;"

    def one_pass(rows: range) -> Lines:
        first = rows[0] == 0
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield "  const vec fc = at.get_next(f + c, channels);"
        # The first pass has all gradients at hand, and so writes those of X and f.
        yield from _load_streams("g", "G", "g_stride", range(n) if first else rows, n)
        if mixes:
            yield from _load_streams("x", "X", "channels", range(n), n)
        if first:
            yield from gradients()
        for i in rows:
            yield from dots(i)
        yield "});"

    def body() -> Lines:
        if n <= UNROLLED:
            for start in range(0, n, at_once):
                yield from one_pass(range(start, min(start + at_once, n)))
            return
        yield f"for_channels(channels, streamed, {_STEP} {{"
        yield from _load_streams("g", "G", "g_stride", range(n), n)
        yield from gradients()
        yield "});"
        yield from block(f"for (int i = 0; i < {n}; ++i)", one_row())

    def one_row() -> Lines:
        yield f"vec products[{n + 1}] = {{}};"
        yield f"for_channels(channels, false, {_STEP} {{"
        yield "  const vec g = at.get(G + i * g_stride + c);"
        if mixes:
            yield from (f"  products[{j}] += g * at.get(X + {j} * channels + c);" for j in range(n))
        yield f"  products[{n}] += g * at.get(f + c);"
        yield "});"
        if mixes:
            yield f"for (int j = 0; j < {n}; ++j) dots[i * {n} + j] = products[j];"
        yield f"dots[{first_post} + i] = products[{n}];"

    head = (
        "write_streams_backward(const Grad* G, long g_stride, const stream_t* X, "
        "const stream_t* f, const float* p, const float* r, stream_t* dx, stream_t* df, "
        "vec* dots, long channels, bool streamed)"
    )
    comment = (
        "// dX_j = sum_i H_res[i, j] dX'_i; df = sum_i H_post[i] dX'_i; the products of dX'_i with "
        "X_j\n// and f, whose sums over the channels are the gradients of H_res and H_post.\n"
        "template <typename Grad>\n"
    )
    return comment + function(head, body())
