"""Text of the kernels of ``mhc::pre``, ``mhc::seam`` and the learned collapse, forward.

A program owns BT tokens. The first pass over the channels makes the products with phi and the
norm; then coefficients are computed on vectors over tokens; the second pass reads the streams
again, which the caches still hold if few tokens are in flight. Where they would not, or where
tokens are too few to fill a GPU, the two passes are two kernels: `..._scan` takes one slice of the
channels a program, and `..._mix` adds the slices' sums in their order. In a single pass the first
one reads them, by weights that are there already, and there is no second.
"""

from collections.abc import Iterator

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_norm import NORM_ARGUMENTS, normalise
from mhc_compile.kernels.triton.emit_post import (
    carried,
    given_weight,
    load_mappings,
    load_row,
    load_streams,
    stream,
)
from mhc_compile.kernels.triton.maps import Maps, power_of_two
from mhc_compile.kernels.triton.text import Kernel, assign, call, function, loop

COLUMN = "read({}, there)[:, None]"
"""How a coefficient is read where it multiplies tiles of tokens by channels."""


def pre_kernels(spec: SiteSpec, maps: Maps) -> list[Kernel]:
    """The two forms of a read of the streams: one launch, or scan and mix."""
    kernels = [_whole(spec, maps, seam=False), _scan(spec, maps, seam=False), _mix(spec, maps)]
    if maps.prefix == "pre":
        kernels += [_whole(spec, maps, seam=True), _scan(spec, maps, seam=True)]
        if spec.branch_norm != "none":
            kernels += [_whole(spec, maps, seam=True, norm=True), _mix(spec, maps, norm=True)]
    return kernels


def block_of_tokens() -> Iterator[str]:
    """The tokens of a program, and which of them exist."""
    yield "t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)"
    yield "there = t < T"


def block_of_channels(n: int) -> Iterator[str]:
    """The channels of one step, and where they lie."""
    yield "c = start + tl.arange(0, BC)"
    yield "live = there[:, None] & (c < C)[None, :]"
    yield f"row = t[:, None] * ({n} * C) + c[None, :]"


def load_previous(n: int) -> Iterator[str]:
    """``x`` tiles and ``f``, from which the next state is made."""
    yield from load_streams(n, "X + row", "x")
    yield "f = read(F + t[:, None] * C + c[None, :], live)"


def keeps_mappings(spec: SiteSpec) -> bool:
    """Whether the mappings fit registers for a whole pass; else each step reads them again."""
    return spec.streams <= 4


def next_stream(spec: SiteSpec, i: int, store: bool) -> Iterator[str]:
    """X'_i as ``v{i}``, rounded as it is stored; the mappings are columns ``p`` and ``r``."""
    yield from assign(f"y{i}", carried(spec, i))
    if store:
        yield f"y{i} = y{i}.to(STREAM)"
        yield f"tl.store({stream('Y + row', i)}, y{i}, mask=live)"
        yield f"v{i} = y{i}.to(tl.float32)"
    else:
        yield f"v{i} = y{i}.to(STREAM).to(tl.float32)"


def logits(maps: Maps, count: int | None = None) -> Iterator[str]:
    """Equation (16), ``h{m}``, from SAVED; ``hidden{m}``, ``z{m}`` and ``inverse{s}`` stay.

    Everything is a vector over the tokens of the program. There may be fewer, a ``count``.
    """
    count = maps.width if count is None else count
    groups = range(group(maps, count - 1) + 1)
    yield from (f"alpha{g} = tl.load(ALPHA + {g})" for g in groups)
    yield f"saved = SAVED + t * {maps.saved}"
    yield from (f"inverse{s} = read(saved + {maps.width + s}, there)" for s in range(maps.norms))
    for m in range(count):
        yield f"z{m} = read(saved + {m}, there)"
        hidden = f"z{m} * inverse{m % maps.norms}"
        yield f"hidden{m} = {f'tanh({hidden})' if maps.gate == 'tanh' else hidden}"
        yield f"h{m} = alpha{group(maps, m)} * hidden{m} + tl.load(BIAS + {m})"


def norm_values(maps: Maps) -> str:
    """How many values one norm is taken over."""
    return "C" if maps.norms == maps.streams else f"({maps.streams} * C)"


def group(maps: Maps, m: int) -> int:
    """The number of the scale of logit ``m``."""
    first = 0
    for number, width in enumerate(maps.groups):
        first += width
        if m < first:
            return number
    raise IndexError(m)


def pre_weights(maps: Maps) -> Iterator[str]:
    """Equation (17): H_pre as ``w{i}``."""
    eps = f" + {maps.pre_eps!r}" if maps.pre_eps else ""
    for i in range(maps.streams):
        yield f"w{i} = {f'h{i}' if maps.gate == 'tanh' else f'tl.sigmoid(h{i})'}{eps}"


def maps_function(spec: SiteSpec, maps: Maps) -> str:
    """The function from z and 1/r of some tokens to their mappings, (16) to (19)."""
    n = spec.streams
    weights = ", ".join(f"w{i}" for i in range(n))
    result = [f"return ({weights},)" if n == 1 else f"return {weights}"]
    return function(
        f"{maps.prefix}_maps",
        [*_maps_arguments(maps), "t", "there"],
        "(16) to (19), vectors over tokens" + ("." if maps.given else "; returns H_pre."),
        [
            *logits(maps),
            *pre_weights(maps),
            *store_mappings(spec, maps),
            *([] if maps.given else result),
        ],
    )


def store_mappings(spec: SiteSpec, maps: Maps) -> Iterator[str]:
    """Equations (18) and (19): H_post and H_res from the logits; a head has neither.

    In a single pass H_pre is stored as well, in front of H_post.
    """
    n, gates = spec.streams, spec.gates
    if maps.prefix == "head":
        return
    for i in range(gates - n):
        yield f"tl.store(NEXT_POST + t * {gates} + {i}, w{i}, mask=there)"
    for i in range(n):
        gate = f"h{n + i}" if maps.gate == "tanh" else f"2.0 * tl.sigmoid(h{n + i})"
        yield f"tl.store(NEXT_POST + t * {gates} + {gates - n + i}, {gate}, mask=there)"
    if maps.mixes:
        yield from call("res = matrix", [f"h{m}" for m in range(2 * n, maps.width)])
        for e in range(n * n):
            yield f"tl.store(NEXT_RES + t * {n * n} + {e}, res[{e}], mask=there)"


def _maps_arguments(maps: Maps) -> tuple[str, ...]:
    results = () if maps.prefix == "head" else ("NEXT_POST", "NEXT_RES")
    return ("BIAS", "ALPHA", *results, "SAVED")


def _start_sums(maps: Maps) -> Iterator[str]:
    yield f"m = tl.arange(0, {maps.padded})"
    for s in range(maps.norms):
        yield f"sum{s} = tl.zeros([BT, {maps.padded}], tl.float32)"
        yield f"square{s} = tl.zeros([BT, BC], tl.float32)"


def at_phi(maps: Maps, j: int) -> str:
    """Channels by columns of phi, for stream ``j``."""
    return f"{f'({j} * C + c)' if j else 'c'}[:, None] * {maps.columns} + m[None, :]"


def _first_step(spec: SiteSpec, maps: Maps, seam: bool) -> Iterator[str]:
    """Equations (14) and (15) for one step: ``sum += v phi`` and ``square += v^2``."""
    inside = f"(c < C)[:, None] & (m < {maps.columns})[None, :]"

    yield from block_of_channels(spec.streams)
    if seam:
        yield from load_previous(spec.streams)
    if maps.given and not keeps_mappings(spec):
        yield from _given_weights(spec, seam)
    if maps.norms > 1:
        yield f"phi = read(PHI + {at_phi(maps, 0)}, {inside})"
    for j in range(maps.streams):
        s = j % maps.norms
        if seam:
            if not keeps_mappings(spec):
                yield from load_row(spec, j, "t", COLUMN)
            yield from next_stream(spec, j, store=True)
        else:
            yield f"v{j} = read({stream('X + row', j)}, live)"
        if maps.norms == 1:
            yield f"phi = read(PHI + {at_phi(maps, j)}, {inside})"
        yield f"sum{s} = tl.dot(v{j}, phi, sum{s}, input_precision=PRECISION)"
        yield f"square{s} += v{j} * v{j}"
    if maps.given:
        yield from assign("u", [f"w{j} * v{j}" for j in range(maps.streams)])
        yield "tl.store(U + t[:, None] * C + c[None, :], u, mask=live)"


def _given_weights(spec: SiteSpec, seam: bool) -> Iterator[str]:
    """H_pre of the site before as columns ``w{i}``."""
    gates = "H_POST" if seam else "GATES"
    for i in range(spec.streams):
        yield f"w{i} = {COLUMN.format(given_weight(spec, gates, i))}"


def _load_kept(spec: SiteSpec, maps: Maps, seam: bool) -> Iterator[str]:
    """What of the site before stays in registers for the whole pass."""
    if not keeps_mappings(spec):
        return
    if seam:
        yield from load_mappings(spec, "t", COLUMN)
    if maps.given:
        yield from _given_weights(spec, seam)


def _mappings_before(maps: Maps, seam: bool) -> tuple[str, ...]:
    """The arguments that hold mappings of the site before."""
    return ("H_POST", "H_RES") if seam else ("GATES",) if maps.given else ()


def _store_sums(maps: Maps, base: str, square: str) -> Iterator[str]:
    """Store the products in the order of the logits, then what belongs to the norms."""
    inside = f"there[:, None] & (m < {maps.columns})[None, :]"
    for s in range(maps.norms):
        at = f"m[None, :] * {maps.norms} + {s}" if maps.norms > 1 else "m[None, :]"
        yield f"tl.store({base}[:, None] + {at}, sum{s}, mask={inside})"
        value = square.format(f"tl.sum(square{s}, 1)")
        yield f"tl.store({base} + {maps.width + s}, {value}, mask=there)"


def _inverse_norm(maps: Maps) -> str:
    """Equation (15), of a sum of squares: a format."""
    eps = f" + {maps.norm_eps!r}" if maps.norm_eps else ""
    return f"tl.rsqrt({{}} / {norm_values(maps)}{eps})"


def _second_pass(spec: SiteSpec, maps: Maps, base: str, norm: bool = False) -> Iterator[str]:
    """The mappings, then ``u = sum_i H_pre[i] X_i`` unless the first pass has made it.

    With ``norm`` that of u in its place, in further passes over u alone.
    """
    n = spec.streams
    # Threads read what others stored: z column by column, and a state in another layout.
    yield "tl.debug_barrier()"
    if maps.given:
        yield from call(f"{maps.prefix}_maps", [*_maps_arguments(maps), "t", "there"])
        return
    yield from call(f"w = {maps.prefix}_maps", [*_maps_arguments(maps), "t", "there"])
    yield from (f"w{i} = w[{i}][:, None]" for i in range(n))
    step = (
        *block_of_channels(n),
        *load_streams(n, f"{base} + row", "v"),
        *assign("u", [f"w{i} * v{i}" for i in range(n)]),
    )
    if norm:
        yield from normalise(spec, step)
        return
    store = "tl.store(U + t[:, None] * C + c[None, :], u, mask=live)"
    yield from loop("for start in range(0, C, BC)", (*step, store))


def _whole(spec: SiteSpec, maps: Maps, seam: bool, norm: bool = False) -> Kernel:
    state, read = "Y" if seam else "X", "norm(u), u" if norm else "u"

    def body() -> Iterator[str]:
        yield from block_of_tokens()
        yield from _load_kept(spec, maps, seam)
        yield from _start_sums(maps)
        yield from loop("for start in range(0, C, BC)", _first_step(spec, maps, seam))
        yield f"saved = SAVED + t * {maps.saved}"
        yield from _store_sums(maps, "saved", _inverse_norm(maps))
        yield from _second_pass(spec, maps, state, norm)

    return Kernel(
        name="seam_norm" if norm else "seam" if seam else maps.prefix,
        comment=(
            "(14) to (19) of X' = H_res X + H_post f, which is stored; "
            f"{read} = sum_i H_pre[i] X'_i."
            if seam
            else "(14) to (19), then u = sum_i H_pre[i] X_i."
        ),
        streams=("X", "F", "Y", "U") if seam else ("X", "U"),
        floats=(
            *(*_mappings_before(maps, seam), "PHI", *_maps_arguments(maps)),
            *(NORM_ARGUMENTS if norm else ()),
        ),
        integers=("T",),
        constants=("C", "BT", "BC", "PRECISION"),
        body=tuple(body()),
    )


def _scan(spec: SiteSpec, maps: Maps, seam: bool) -> Kernel:
    def body() -> Iterator[str]:
        yield from block_of_tokens()
        yield "part = tl.program_id(1)"
        yield from _load_kept(spec, maps, seam)
        yield from _start_sums(maps)
        head = "for start in range(part * SLICE, (part + 1) * SLICE, BC)"
        yield from loop(head, _first_step(spec, maps, seam))
        yield f"partial = PARTIAL + (part.to(tl.int64) * T + t) * {maps.partial}"
        yield from _store_sums(maps, "partial", "{}")

    return Kernel(
        name="seam_scan" if seam else f"{maps.prefix}_scan",
        comment=(
            "X' = H_res X + H_post f, and the sums of (14) and (15) over SLICE channels."
            if seam
            else "The sums of (14) and (15) over SLICE channels."
        ),
        streams=(*(("X", "F", "Y") if seam else ("X",)), *(("U",) if maps.given else ())),
        floats=(*_mappings_before(maps, seam), "PHI", "PARTIAL"),
        integers=("T",),
        constants=("C", "SLICE", "BT", "BC", "PRECISION"),
        body=tuple(body()),
    )


def _mix(spec: SiteSpec, maps: Maps, norm: bool = False) -> Kernel:
    padded = power_of_two(maps.width)

    def step() -> Iterator[str]:
        yield f"partial = PARTIAL + (start // SLICE * T + t) * {maps.partial}"
        yield "total += read(partial[:, None] + m[None, :], inside)"
        for s in range(maps.norms):
            yield f"square{s} += read(partial + {maps.width + s}, there)"

    def body() -> Iterator[str]:
        yield from block_of_tokens()
        yield f"m = tl.arange(0, {padded})"
        yield f"inside = there[:, None] & (m < {maps.width})[None, :]"
        yield f"total = tl.zeros([BT, {padded}], tl.float32)"
        yield from (f"square{s} = tl.zeros([BT], tl.float32)" for s in range(maps.norms))
        yield from loop("for start in range(0, C, SLICE)", step())
        yield f"saved = SAVED + t * {maps.saved}"
        yield "tl.store(saved[:, None] + m[None, :], total, mask=inside)"
        for s in range(maps.norms):
            inverse = _inverse_norm(maps).format(f"square{s}")
            yield f"tl.store(saved + {maps.width + s}, {inverse}, mask=there)"
        yield from _second_pass(spec, maps, "X", norm)

    read = "norm(u), u" if norm else "u"
    return Kernel(
        name="seam_norm_mix" if norm else f"{maps.prefix}_mix",
        comment="(14) to (19) from the sums of all slices"
        + ("." if maps.given else f", then {read} = sum_i H_pre[i] X_i."),
        streams=() if maps.given else ("X", "U"),
        floats=("PARTIAL", *_maps_arguments(maps), *(NORM_ARGUMENTS if norm else ())),
        integers=("T",),
        constants=("C", "SLICE", "BT", "BC"),
        body=tuple(body()),
    )
