"""Text of the kernels of sites whose mappings are the same for every token.

There is nothing to wait for: each kernel reads the streams once and writes them once. The mappings,
and the gradient of the bias, are a kernel of one program; gradients of the mappings are sums over
the tokens, left token by token for ``sum_rows``.
"""

from collections.abc import Iterator

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_backward import through_gates
from mhc_compile.kernels.triton.emit_post import (
    block_of_one_token,
    branch_returned,
    carried,
    load_mappings,
    load_streams,
    products,
    returned,
    store_products,
    store_streams,
    stream,
)
from mhc_compile.kernels.triton.emit_pre import pre_weights, store_mappings
from mhc_compile.kernels.triton.maps import Maps
from mhc_compile.kernels.triton.text import Kernel, assign, loop


def static_kernels(spec: SiteSpec, maps: Maps) -> list[Kernel]:
    """``..._static_maps`` and its gradient; of a site also pre, seam and their gradients."""
    kernels = [_maps(spec, maps), _maps_backward(spec, maps)]
    if maps.prefix == "pre":
        kernels += [_pre(spec), _pre_backward(spec), _seam(spec), _seam_backward(spec)]
    return kernels


def read_kernels(spec: SiteSpec) -> list[Kernel]:
    """``mhc::read`` and its gradient, by weights each token has; a static site's are `_pre`."""
    if not (spec.single_pass and spec.dynamic):
        return []
    return [_pre(spec), _pre_backward(spec)]


def _one_token(maps: Maps) -> Iterator[str]:
    yield "t = tl.arange(0, 1)"
    yield "there = t < 1"
    yield from (f"h{m} = read(BIAS + t + {m}, there)" for m in range(maps.width))


def _maps(spec: SiteSpec, maps: Maps) -> Kernel:
    n = spec.streams
    body = (
        *_one_token(maps),
        *pre_weights(maps),
        *(f"tl.store(H_PRE + t + {i}, w{i}, mask=there)" for i in range(n)),
        *store_mappings(spec, maps),
    )
    results = () if maps.prefix == "head" else ("NEXT_POST", "NEXT_RES")
    return Kernel(
        name=f"{maps.prefix}_static_maps",
        comment="(17) to (19) of the bias alone. One program.",
        streams=(),
        floats=("BIAS", "H_PRE", *results),
        body=body,
    )


def _maps_backward(spec: SiteSpec, maps: Maps) -> Kernel:
    own = () if maps.given else ("DH_PRE",)  # else it comes in front of that of H_post
    body = (
        *_one_token(maps),
        *(f"d{i} = read(DH_PRE + t + {i}, there)" for i in range(spec.streams) if own),
        *through_gates(spec, maps),
        *(f"tl.store(DBIAS + t + {m}, dh{m}, mask=there)" for m in range(maps.width)),
    )
    grads = () if maps.prefix == "head" else ("NEXT_DPOST", "NEXT_DRES")
    return Kernel(
        name=f"{maps.prefix}_static_maps_backward",
        comment="Through (19) to (17) to the bias. One program.",
        streams=(),
        floats=("BIAS", *own, *grads, "DBIAS"),
        body=body,
    )


def _load_weights(spec: SiteSpec) -> Iterator[str]:
    own = f" + t * {spec.gates}" if spec.dynamic else ""
    yield from (f"w{i} = tl.load(H_PRE{own} + {i})" for i in range(spec.streams))


def _pre(spec: SiteSpec) -> Kernel:
    n = spec.streams
    body = (
        *block_of_one_token(n),
        *load_streams(n, "X + row", "x"),
        *_load_weights(spec),
        *assign("u", [f"w{i} * x{i}" for i in range(n)]),
        "tl.store(U + t * C + c, u, mask=live)",
    )
    return Kernel(
        name="read_streams" if spec.dynamic else "static_pre",
        comment="u = sum_i H_pre[i] X_i. One token, BC channels a program.",
        streams=("X", "U"),
        floats=("H_PRE",),
        constants=("C", "BC"),
        body=body,
    )


def _seam(spec: SiteSpec) -> Kernel:
    n = spec.streams

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "X + row", "x")
        yield "f = read(F + t * C + c, live)"
        yield from load_mappings(spec, "t", "tl.load({})")
        yield from _load_weights(spec)
        for i in range(n):
            yield from assign(f"y{i}", carried(spec, i))
            yield f"y{i} = y{i}.to(STREAM)"
        yield from store_streams(n, "Y + row", "y")
        yield from assign("u", [f"w{i} * y{i}.to(tl.float32)" for i in range(n)])
        yield "tl.store(U + t * C + c, u, mask=live)"

    return Kernel(
        name="static_seam",
        comment="X' = H_res X + H_post f; u = sum_i H_pre[i] X'_i. One token a program.",
        streams=("X", "F", "Y", "U"),
        floats=("H_POST", "H_RES", "H_PRE"),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def _sums(names: list[str]) -> Iterator[str]:
    yield from (f"{name} = tl.zeros([BC // VECTOR], tl.float32)" for name in names)


def _channels(n: int) -> Iterator[str]:
    yield "c = start + tl.arange(0, BC)"
    yield "live = c < C"
    yield f"row = t * ({n} * C) + c"


def _store_weights(spec: SiteSpec) -> Iterator[str]:
    n = spec.streams
    apart = spec.gates if spec.dynamic else n  # of a static site, what is added over tokens
    yield from (f"tl.store(DH_PRE + t * {apart} + {i}, tl.sum(d{i}, 0))" for i in range(n))
    yield from (f"tl.store(DH_PRE + t * {apart} + {i}, 0.0)" for i in range(n, apart))


def _pre_backward(spec: SiteSpec) -> Kernel:
    n = spec.streams

    def step() -> Iterator[str]:
        yield from _channels(n)
        yield from load_streams(n, "X + row", "x")
        yield "du = read(DU + t * C + c, live)"
        for i in range(n):
            yield f"tl.store({stream('DX + row', i)}, w{i} * du, mask=live)"
            yield f"d{i} += by_vector(x{i} * du, BC)"

    body = (
        "t = tl.program_id(0).to(tl.int64)",
        *_load_weights(spec),
        *_sums([f"d{i}" for i in range(n)]),
        *loop("for start in range(0, C, BC)", step()),
        *_store_weights(spec),
    )
    return Kernel(
        name="read_streams_backward" if spec.dynamic else "static_pre_backward",
        comment="dX_i = H_pre[i] du; dH_pre[i] = <X_i, du>. One token a program.",
        streams=("DU", "X", "DX"),
        floats=("H_PRE", "DH_PRE"),
        constants=("C", "BC"),
        body=body,
    )


def _seam_backward(spec: SiteSpec) -> Kernel:
    n = spec.streams
    names = [name for i in range(n) for name, _ in products(spec, i)]

    def step() -> Iterator[str]:
        yield from _channels(n)
        yield from load_streams(n, "X + row", "x")
        yield "f = read(F + t * C + c, live)"
        yield "du = read(DU + t * C + c, live)"
        for i in range(n):
            yield from assign(f"v{i}", carried(spec, i))
            yield f"d{i} += by_vector(v{i}.to(STREAM).to(tl.float32) * du, BC)"
            yield f"g{i} = read({stream('DY + row', i)}, live) + w{i} * du"
            for name, factor in products(spec, i):
                yield f"{name} += by_vector(g{i} * {factor}, BC)"
        for j in range(n):
            yield from assign(f"dx{j}", returned(spec, j))
        yield from store_streams(n, "DX + row", "dx")
        yield from assign("df", branch_returned(spec))
        yield "tl.store(DF + t * C + c, df, mask=live)"

    body = (
        "t = tl.program_id(0).to(tl.int64)",
        *load_mappings(spec, "t", "tl.load({})"),
        *_load_weights(spec),
        *_sums([*names, *(f"d{i}" for i in range(n))]),
        *loop("for start in range(0, C, BC)", step()),
        *store_products(spec, f"DH_POST + t * {n}", f"DH_RES + t * {n * n}", "tl.sum({}, 0)"),
        *_store_weights(spec),
    )
    return Kernel(
        name="static_seam_backward",
        comment="dX' += H_pre du, then on to X and f, with its products. One token a program.",
        streams=("DY", "DU", "X", "F", "DX", "DF"),
        floats=("H_POST", "H_RES", "H_PRE", "DH_POST", "DH_RES", "DH_PRE"),
        constants=("C", "BC"),
        body=body,
    )
