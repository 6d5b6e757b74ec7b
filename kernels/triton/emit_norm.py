"""Text for the norm that a branch starts with, ``y = (u - mean) r weight + shift``.

Forward a program has whole rows of u: it leaves u where y will stand, and reads it again, once more
for a mean, from the caches. Backward u is a sum of streams that both kernels read anyway: the one
that owns tokens makes the gradient of H_pre from products of the streams with g = dy weight and
with u, where du is a combination of both,

    du = r g + k (u - mean) + l,   k = -r^3 <g, u - mean> / C,   l = -r <g, 1> / C  (LayerNorm),

and leaves r, k and l; the one that owns channels makes du of them, and sums over its tokens of the
gradients of weight and shift.
"""

from collections.abc import Iterable, Iterator

from mhc_compile.kernels.branch_norm import STATISTICS
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.text import assign, loop

NORM_ARGUMENTS = ("WEIGHT", "SHIFT", "STATISTICS")
"""What the forward kernels get for it."""
NORM_HELPER = """\
@triton.jit
def by_vectors(v, BT: tl.constexpr, BC: tl.constexpr):
    # Sums of what each thread holds, token by token.
    return tl.sum(tl.reshape(v, (BT, BC // VECTOR, VECTOR)), 2)
"""
_U = "U + t[:, None] * C + c[None, :]"


def centred(spec: SiteSpec) -> bool:
    """Whether a mean is subtracted."""
    return spec.branch_norm == "layer"


def through(spec: SiteSpec) -> int:
    """Numbers per token that say what du is made of."""
    return 3 if centred(spec) else 2


def normalise(spec: SiteSpec, make_u: tuple[str, ...]) -> Iterator[str]:
    """The passes over u; ``make_u`` are the lines of one step of the first."""
    yield "total = tl.zeros([BT, BC], tl.float32)"
    yield "squares = tl.zeros([BT, BC], tl.float32)"
    first = (
        *make_u,
        "u = u.to(STREAM)",
        f"tl.store({_U}, u, mask=live)",
        "u = u.to(tl.float32)",
        "total += u" if centred(spec) else "squares += u * u",
    )
    again = (
        "c = start + tl.arange(0, BC)",
        "live = there[:, None] & (c < C)[None, :]",
        f"u = read({_U}, live)",
    )
    yield from _over_channels(first)
    yield "tl.debug_barrier()  # another thread may have stored what this one reads"
    if centred(spec):
        yield "mean = tl.sum(total, 1) / C"
        subtract = "u = tl.where(live, u - mean[:, None], 0.0)"
        yield from _over_channels((*again, subtract, "squares += u * u"))
        yield "tl.debug_barrier()"
    yield f"r = tl.rsqrt(tl.sum(squares, 1) / C + {spec.branch_eps!r})"
    count = STATISTICS[spec.branch_norm]
    yield f"tl.store(STATISTICS + t * {count}, r, mask=there)"
    if centred(spec):
        yield f"tl.store(STATISTICS + t * {count} + 1, mean, mask=there)"
    last = (
        *again,
        *(["u = u - mean[:, None]"] if centred(spec) else []),
        "y = u * r[:, None]",
        *(["y = y.to(STREAM).to(tl.float32)"] if spec.branch_rounds else []),
        "y = y * read(WEIGHT + c, c < C)[None, :] + read(SHIFT + c, c < C)[None, :]",
        f"tl.store({_U}, y, mask=live)",
    )
    yield from _over_channels(last)


def _over_channels(step: Iterable[str]) -> Iterator[str]:
    yield from loop("for start in range(0, C, BC)", step)


def load_statistics(spec: SiteSpec, shape: str) -> Iterator[str]:
    """``r``, and ``mean``; ``shape`` makes what multiplies tiles of a vector over tokens."""
    count = STATISTICS[spec.branch_norm]
    yield f"r = read(STATISTICS + t * {count}, there){shape}"
    if centred(spec):
        yield f"mean = read(STATISTICS + t * {count} + 1, there){shape}"


def branch_input(spec: SiteSpec) -> Iterator[str]:
    """``u``, rounded as it would be stored and less its mean, of ``w{j}`` and ``v{j}``."""
    yield from assign("u", [f"w{j} * v{j}" for j in range(spec.streams)])
    yield f"u = u.to(STREAM).to(tl.float32){' - mean' if centred(spec) else ''}"


def start_products(spec: SiteSpec) -> Iterator[str]:
    """Sums of what each thread holds, of the products that the gradient of H_pre is made of."""
    for name in _products(spec):
        yield f"{name} = tl.zeros([BT, BC // VECTOR], tl.float32)"


def add_products(spec: SiteSpec) -> Iterator[str]:
    """One step of them, from ``du`` (the gradient of y), ``u`` and the streams ``v{i}``."""
    yield "g = du * read(WEIGHT + c, c < C)[None, :]"
    for name, value in _products(spec).items():
        yield f"{name} += by_vectors({value}, BT, BC)"


def _products(spec: SiteSpec) -> dict[str, str]:
    streams = range(spec.streams)
    found = {f"of_g{i}": f"g * v{i}" for i in streams} | {f"of_u{i}": f"u * v{i}" for i in streams}
    found["along"] = "g * u"
    if centred(spec):
        found |= {f"of_1{i}": f"v{i}" for i in streams} | {"level": "g"}
    return found


def finish_products(spec: SiteSpec) -> Iterator[str]:
    """``d{i}``, the gradient of H_pre; leaves what du is made of in THROUGH."""
    yield from load_statistics(spec, "")
    yield "k = -(r * r * r) * tl.sum(along, 1) / C"
    if centred(spec):
        yield "l = -r * tl.sum(level, 1) / C"
    for i in range(spec.streams):
        terms = [f"r * tl.sum(of_g{i}, 1)", f"k * tl.sum(of_u{i}, 1)"]
        terms += [f"l * tl.sum(of_1{i}, 1)"] if centred(spec) else []
        yield from assign(f"d{i}", terms)
    for at, name in enumerate("rkl"[: through(spec)]):
        yield f"tl.store(THROUGH + t * {through(spec)} + {at}, {name}, mask=there)"


def gradient_of_u(spec: SiteSpec) -> Iterator[str]:
    """``du`` from the gradient of y in its place; adds to those of weight and shift."""
    yield "y = u * r"
    rounded = "y.to(STREAM).to(tl.float32)" if spec.branch_rounds else "y"
    yield f"dweight += tl.sum(du * {rounded}, 0)"
    yield "dshift += tl.sum(du, 0)"
    count = through(spec)
    for at, name in enumerate("rkl"[:count]):
        if name != "r":
            yield f"{name} = read(THROUGH + t * {count} + {at}, there)[:, None]"
    yield f"du = r * (du * weight) + k * u{' + l' if centred(spec) else ''}"
