"""Text of the backward kernels of ``mhc::pre``, ``mhc::seam`` and the learned collapse.

Three kernels, because the gradients of the logits need sums over all channels first, and a part of
the gradient of phi that stays in registers leaves no room for those of the streams. `..._maps` owns
BT tokens: it reads the streams and du, and leaves what is a number per token in WORK. The other two
own BC channels and walk over tokens: `..._streams` writes the gradients of the streams and
`..._phi` that of phi. The seam makes X' again from X and f in each: for n = 4 they move 6, 15 and 5
rows of C per token. Sums over slices or programs are left in memory and added by a kernel of their
own in a fixed order: no atomics. In a single pass the gradient of H_pre comes from the next site:
`..._maps` reads no streams, and `..._streams` leaves the products of du with them.
"""

from collections.abc import Iterator

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_norm import (
    add_products,
    branch_input,
    centred,
    finish_products,
    gradient_of_u,
    load_statistics,
    start_products,
)
from mhc_compile.kernels.triton.emit_post import (
    given_weight,
    load_mappings,
    load_row,
    products,
    store_streams,
    stream,
)
from mhc_compile.kernels.triton.emit_pre import (
    COLUMN,
    at_phi,
    block_of_channels,
    block_of_tokens,
    group,
    keeps_mappings,
    load_previous,
    logits,
    next_stream,
    norm_values,
    pre_weights,
)
from mhc_compile.kernels.triton.maps import Maps, power_of_two
from mhc_compile.kernels.triton.text import Kernel, assign, call, function, loop


def backward_kernels(spec: SiteSpec, maps: Maps) -> list[Kernel]:
    """The three kernels of a read of the streams, for the seam too, and the sums they leave."""
    kernels = [_sum_maps(maps)]
    for seam in (False, True) if maps.prefix == "pre" else (False,):
        makers = (_streams, _phi) if maps.given and seam else (_maps, _streams, _phi)
        kernels += [make(spec, maps, seam) for make in makers]
    if maps.prefix == "pre":
        kernels += [_streams(spec, maps, seam=False, more=True), _sum_products(spec, seam=True)]
    if maps.prefix == "pre" and spec.branch_norm != "none":
        kernels += [make(spec, maps, seam=True, norm=True) for make in (_maps, _streams)]
    if maps.given:
        kernels.append(_sum_products(spec, seam=False))
    return kernels


def product_count(spec: SiteSpec, seam: bool = True) -> int:
    """Gradients of h_res and h_post per token; of a single pass those of H_pre, behind them."""
    n = spec.streams
    mixed = n * n if constraint_of(spec).mixes else 0
    return (mixed + n if seam else 0) + spec.gates - n


def maps_backward_function(spec: SiteSpec, maps: Maps) -> str:
    """The function from the gradients of the mappings of some tokens to WORK and SUMS."""

    def body() -> Iterator[str]:
        yield from logits(maps)
        if not maps.given:
            yield from pre_weights(maps)
        yield from through_gates(spec, maps)
        yield from _through_affine(maps)

    dots = [] if maps.given else [f"d{i}" for i in range(spec.streams)]
    return function(
        f"{maps.prefix}_maps_backward",
        [*dots, *_maps_arguments(maps), "C", "t", "there"],
        "Through (19) to (15): dz, and what else of dX is a number per token.",
        body(),
    )


def _maps_arguments(maps: Maps) -> tuple[str, ...]:
    grads = () if maps.prefix == "head" else ("NEXT_DPOST", "NEXT_DRES")
    return ("BIAS", "ALPHA", "SAVED", *grads, "WORK", "SUMS")


def _maps(spec: SiteSpec, maps: Maps, seam: bool, norm: bool = False) -> Kernel:
    n = spec.streams

    def step() -> Iterator[str]:
        yield from block_of_channels(n)
        yield "du = read(DU + t[:, None] * C + c[None, :], live)"
        if seam:
            yield from load_previous(n)
        for i in range(n):
            if seam:
                if not keeps_mappings(spec):
                    yield from load_row(spec, i, "t", COLUMN)
                yield from next_stream(spec, i, store=False)
            else:
                yield f"v{i} = read({stream('X + row', i)}, live)"
            if not norm:
                yield f"d{i} += v{i} * du"
        if norm:
            yield from branch_input(spec)
            yield from add_products(spec)

    def products_of_norm() -> Iterator[str]:
        yield from logits(maps, n)
        yield from pre_weights(maps)
        yield from (f"w{i} = w{i}[:, None]" for i in range(n))
        if centred(spec):
            yield from load_statistics(spec, "[:, None]")
        yield from start_products(spec)
        yield from loop("for start in range(0, C, BC)", step())
        yield from finish_products(spec)

    def body() -> Iterator[str]:
        yield from block_of_tokens()
        if maps.given:
            yield from call("pre_maps_backward", [*_maps_arguments(maps), "C", "t", "there"])
            return
        if seam and keeps_mappings(spec):
            yield from load_mappings(spec, "t", COLUMN)
        if norm:
            yield from products_of_norm()
        else:
            yield from (f"d{i} = tl.zeros([BT, BC], tl.float32)" for i in range(n))
            yield from loop("for start in range(0, C, BC)", step())
        dots = [f"d{i}" if norm else f"tl.sum(d{i}, 1)" for i in range(n)]
        arguments = [*dots, *_maps_arguments(maps), "C", "t", "there"]
        yield from call(f"{maps.prefix}_maps_backward", arguments)

    source = "dH_pre of the next site" if maps.given else "dH_pre[i] = <X_i, du>"
    name = "seam_norm" if norm else "seam" if seam else maps.prefix
    if norm:
        source = "dH_pre[i] = <X_i, du> by way of the norm"
    return Kernel(
        name=f"{name}_backward_maps",
        comment=f"{source}, then back to dz; sums for bias and alpha over the program's\ntokens.",
        streams=() if maps.given else ("X", "F", "DU") if seam else ("X", "DU"),
        floats=(
            *(("H_POST", "H_RES") if seam else ()),
            *_maps_arguments(maps),
            *(("WEIGHT", "STATISTICS", "THROUGH") if norm else ()),
        ),
        integers=("T",),
        constants=("C", "BT", "BC"),
        body=tuple(body()),
    )


def through_gates(spec: SiteSpec, maps: Maps) -> Iterator[str]:
    """``dh{m}``, the gradients of the logits."""
    n, gates, tanh = spec.streams, spec.gates, maps.gate == "tanh"
    for i in range(n):
        if maps.given:
            yield f"d{i} = read(NEXT_DPOST + t * {gates} + {i}, there)"
        if tanh:
            yield f"dh{i} = d{i}"
        else:
            yield f"gate{i} = tl.sigmoid(h{i})"
            yield f"dh{i} = d{i} * (gate{i} * (1.0 - gate{i}))"
    if maps.prefix == "head":
        return
    for i in range(n):
        grad = f"read(NEXT_DPOST + t * {gates} + {gates - n + i}, there)"
        if tanh:
            yield f"dh{n + i} = {grad}"
        else:
            yield f"gate{n + i} = tl.sigmoid(h{n + i})"
            yield f"dh{n + i} = {grad} * (2.0 * gate{n + i} * (1.0 - gate{n + i}))"
    if maps.mixes:
        for e in range(n * n):
            yield f"dres{e} = read(NEXT_DRES + t * {n * n} + {e}, there)"
        k = constraint_of(spec).logits(n)
        arguments = [f"dres{e}" for e in range(n * n)] + [f"h{2 * n + m}" for m in range(k)]
        yield from call("dlogits = matrix_backward", arguments)
        yield from (f"dh{2 * n + m} = dlogits[{m}]" for m in range(k))


def _through_affine(maps: Maps) -> Iterator[str]:
    """``dz`` and the factors of x, to WORK; sums for bias and alpha, to SUMS."""
    width = maps.width
    yield f"work = WORK + t * {maps.work}"
    for m in range(width):
        bound = f" * (1.0 - hidden{m} * hidden{m})" if maps.gate == "tanh" else ""
        yield f"dhidden{m} = dh{m} * alpha{group(maps, m)}{bound}"
        yield f"tl.store(work + {m}, dhidden{m} * inverse{m % maps.norms}, mask=there)"
    yield "# d(1/r)/dx = -(1/r)^3 x / (values of one norm)."
    for s in range(maps.norms):
        yield from assign(
            f"dinverse{s}", [f"dhidden{m} * z{m}" for m in range(s, width, maps.norms)]
        )
        cube = f"inverse{s} * inverse{s} * inverse{s}"
        shrink = f"-dinverse{s} * ({cube}) / {norm_values(maps)}"
        yield f"tl.store(work + {width + s}, {shrink}, mask=there)"
    if not maps.given:
        for i in range(maps.streams):
            yield f"tl.store(work + {maps.saved + i}, w{i}, mask=there)"
    yield f"sums = SUMS + tl.program_id(0) * {width + len(maps.groups)}"
    yield from (f"tl.store(sums + {m}, tl.sum(dh{m}, 0))" for m in range(width))
    for g in range(len(maps.groups)):
        terms = [f"dh{m} * hidden{m}" for m in range(width) if group(maps, m) == g]
        if terms:
            yield from assign(f"dalpha{g}", terms)
            yield f"tl.store(sums + {width + g}, tl.sum(dalpha{g}, 0))"
        else:
            yield f"tl.store(sums + {width + g}, 0.0)"


def _walk(seam: bool, n: int) -> Iterator[str]:
    """The tokens and channels of one step of a program that owns channels."""
    yield "t = tl.arange(0, BT).to(tl.int64) + start"
    yield "there = t < last"
    yield "live = there[:, None] & inside[None, :]"
    yield f"row = t[:, None] * ({n} * C) + c[None, :]"
    if seam:
        yield from load_previous(n)


def _owned_channels() -> Iterator[str]:
    yield "c = tl.program_id(0) * BC + tl.arange(0, BC)"
    yield "inside = c < C"
    yield "first = tl.program_id(1) * SPAN"
    yield "last = tl.minimum(first + SPAN, T)"


def _load_dz(maps: Maps) -> Iterator[str]:
    yield f"work = WORK + t * {maps.work}"
    inside = f"there[:, None] & (m < {maps.columns})[None, :]"
    for s in range(maps.norms):
        at = f"m[None, :] * {maps.norms} + {s}" if maps.norms > 1 else "m[None, :]"
        yield f"dz{s} = read(work[:, None] + {at}, {inside})"


def _at_phi_turned(maps: Maps, j: int) -> str:
    """The columns of phi by channels, for stream ``j``."""
    return f"m[:, None] + {f'({j} * C + c)' if j else 'c'}[None, :] * {maps.columns}"


def _stream(spec: SiteSpec, seam: bool, j: int) -> Iterator[str]:
    """Stream ``j`` that was projected, as ``v{j}``."""
    if seam:
        yield from load_row(spec, j, "t", COLUMN)
        yield from next_stream(spec, j, store=False)
    else:
        yield f"v{j} = read({stream('X + row', j)}, live)"


def _streams(
    spec: SiteSpec, maps: Maps, seam: bool, more: bool = False, norm: bool = False
) -> Kernel:
    n, count = spec.streams, product_count(spec, seam)
    first_pre = count - (spec.gates - n)  # products: H_res, H_post, then H_pre of the site before
    gates = "H_POST" if seam else "GATES"

    def step() -> Iterator[str]:
        yield from _walk(seam, n)
        yield "du = read(DU + t[:, None] * C + c[None, :], live)"
        yield from _load_dz(maps)
        if count:
            yield f"products = PRODUCTS + tl.program_id(0).to(tl.int64) * {count} * T + t"
        if norm:
            yield from load_statistics(spec, "[:, None]")
            for j in range(n):
                yield from _stream(spec, seam, j)
                yield f"w{j} = {COLUMN.format(f'work + {maps.saved + j}')}"
            yield from branch_input(spec)
            yield from gradient_of_u(spec)
        for j in range(n):
            s = j % maps.norms
            if not norm:
                yield from _stream(spec, seam, j)
            if maps.given:
                value = f"tl.sum(v{j} * du, 1)"
                yield f"tl.store(products + {first_pre + j} * T, {value}, mask=there)"
            if maps.norms == 1 or j == 0:
                yield f"phi = read(PHI + {_at_phi_turned(maps, j)}, of_phi)"
            weight = given_weight(spec, gates, j) if maps.given else f"work + {maps.saved + j}"
            if not norm:
                yield f"w{j} = {COLUMN.format(weight)}"
            yield f"shrink{j} = read(work + {maps.width + s}, there)[:, None]"
            yield f"g{j} = w{j} * du + shrink{j} * v{j}"
            yield f"g{j} += tl.dot(dz{s}, phi, input_precision=PRECISION)"
            if more:
                yield f"g{j} += read({stream('DX_MORE + row', j)}, live)"
            if seam:
                yield from through_post(j)
            else:
                yield f"tl.store({stream('DX + row', j)}, g{j}, mask=live)"
        if seam:
            yield from store_streams(n, "DX + row", "dx" if maps.mixes else "g")
            yield "tl.store(DF + t[:, None] * C + c[None, :], df, mask=live)"

    def through_post(j: int) -> Iterator[str]:
        yield f"g{j} += read({stream('DY + row', j)}, live)"
        for name, factor in products(spec, j):
            number = int(name[1:]) + (first_pre - n if name[0] == "q" else 0)
            value = f"tl.sum(g{j} * {factor}, 1)"
            yield f"tl.store(products + {number} * T, {value}, mask=there)"
        add = "+=" if j else "="
        yield f"df {add} p{j} * g{j}"
        if maps.mixes:
            yield from (f"dx{k} {add} r{j * n + k} * g{j}" for k in range(n))

    start_norm = (
        "weight = read(WEIGHT + c, inside)[None, :]",
        "dweight = tl.zeros([BC], tl.float32)",
        "dshift = tl.zeros([BC], tl.float32)",
    )
    store_norm = (
        "part = tl.program_id(1) * C + c",
        "tl.store(DWEIGHT + part, dweight, mask=inside)",
        "tl.store(DSHIFT + part, dshift, mask=inside)",
    )
    body = (
        *_owned_channels(),
        f"m = tl.arange(0, {maps.padded})",
        f"of_phi = (m < {maps.columns})[:, None] & inside[None, :]",
        *(start_norm if norm else ()),
        *loop("for start in range(first, last, BT)", step()),
        *(store_norm if norm else ()),
    )
    prefix, plus = ("pre_more", "(what else X gets) + ") if more else (maps.prefix, "")
    if seam:
        prefix = "seam_norm" if norm else "seam"
    return Kernel(
        name=f"{prefix}_backward_streams",
        comment=(
            "dX' += H_pre du + dz phi^T + (its part through the norm), then on to X and f, with\n"
            "its products with both. BC channels of SPAN tokens a program."
            if seam
            else f"dX = {plus}H_pre du + dz phi^T + (its part through the norm).\n"
            "BC channels of SPAN tokens a program."
        ),
        streams=("DY", "DU", "X", "F", "DX", "DF")
        if seam
        else ("DU", "X", *(("DX_MORE",) if more else ()), "DX"),
        floats=(
            *(("H_POST", "H_RES") if seam else ("GATES",) if maps.given else ()),
            *("PHI", "WORK"),
            *(("PRODUCTS",) if count else ()),
            *(("WEIGHT", "STATISTICS", "THROUGH", "DWEIGHT", "DSHIFT") if norm else ()),
        ),
        integers=("T", "SPAN"),
        constants=("C", "BT", "BC", "PRECISION"),
        body=body,
    )


def _phi(spec: SiteSpec, maps: Maps, seam: bool) -> Kernel:
    n = spec.streams
    tiles = 1 if maps.norms > 1 else n  # all streams share one projection, or have one each

    def step() -> Iterator[str]:
        yield from _walk(seam, n)
        yield from _load_dz(maps)
        for j in range(n):
            tile = min(j, tiles - 1)
            yield from _stream(spec, seam, j)
            product = f"tl.trans(v{j}), dz{j % maps.norms}, dphi{tile}"
            yield f"dphi{tile} = tl.dot({product}, input_precision=PRECISION)"

    body = (
        *_owned_channels(),
        f"m = tl.arange(0, {maps.padded})",
        *(f"dphi{j} = tl.zeros([BC, {maps.padded}], tl.float32)" for j in range(tiles)),
        *loop("for start in range(first, last, BT)", step()),
        f"part = DPHI + tl.program_id(1).to(tl.int64) * ({tiles} * C * {maps.columns})",
        f"of_phi = inside[:, None] & (m < {maps.columns})[None, :]",
        *(f"tl.store(part + {at_phi(maps, j)}, dphi{j}, mask=of_phi)" for j in range(tiles)),
    )
    return Kernel(
        name="seam_backward_phi" if seam else f"{maps.prefix}_backward_phi",
        comment="dphi = X^T dz over SPAN tokens. BC channels a program.",
        streams=("X", "F") if seam else ("X",),
        floats=(*(("H_POST", "H_RES") if seam else ()), "WORK", "DPHI"),
        integers=("T", "SPAN"),
        constants=("C", "BT", "BC", "PRECISION"),
        body=body,
    )


def _sum_maps(maps: Maps) -> Kernel:
    width, total = maps.width, maps.width + len(maps.groups)
    body = (
        f"m = tl.arange(0, {power_of_two(total)})",
        f"total = tl.zeros([BR, {power_of_two(total)}], tl.float32)",
        *loop(
            "for start in range(0, ROWS, BR)",
            (
                "row = start + tl.arange(0, BR)",
                f"inside = (row < ROWS)[:, None] & (m < {total})[None, :]",
                f"total += read(SUMS + row[:, None] * {total} + m[None, :], inside)",
            ),
        ),
        "total = tl.sum(total, 0)",
        f"tl.store(DBIAS + m, total, mask=m < {width})",
        f"tl.store(DALPHA + m - {width}, total, mask=(m >= {width}) & (m < {total}))",
    )
    return Kernel(
        name=f"{maps.prefix}_sum_maps",
        comment="The gradients of bias and alpha from the sums of all programs. One program.",
        streams=(),
        floats=("SUMS", "DBIAS", "DALPHA"),
        integers=("ROWS",),
        constants=("BR",),
        body=body,
    )


def _sum_products(spec: SiteSpec, seam: bool) -> Kernel:
    n, count, gates = spec.streams, product_count(spec, seam), spec.gates
    first_post = count - gates  # behind H_res: H_post, and H_pre of the site before

    def body() -> Iterator[str]:
        yield from block_of_tokens()
        yield from (f"sum{e} = tl.zeros([BT], tl.float32)" for e in range(count))
        yield "at = t"
        step = [f"sum{e} += read(PRODUCTS + at + {e} * T, there)" for e in range(count)]
        yield from loop("for _ in range(0, SLICES)", [*step, f"at += {count} * T"])
        for i in range(n):
            value = f"sum{first_post + i}" if seam else "0.0"
            yield f"tl.store(DH_POST + t * {gates} + {gates - n + i}, {value}, mask=there)"
        for i in range(gates - n):
            yield f"tl.store(DH_POST + t * {gates} + {i}, sum{count - n + i}, mask=there)"
        if seam:
            for e in range(first_post):
                yield f"tl.store(DH_RES + t * {n * n} + {e}, sum{e}, mask=there)"

    whose = "H_post and H_res" if seam else "gates"
    return Kernel(
        name="sum_products" if seam else "sum_weights",
        comment=f"The gradients of {whose} from the sums of all slices of the channels.",
        streams=(),
        floats=("PRODUCTS", "DH_POST", *(("DH_RES",) if seam else ())),
        integers=("T", "SLICES"),
        constants=("BT",),
        body=tuple(body()),
    )
