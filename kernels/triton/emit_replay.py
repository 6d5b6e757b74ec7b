"""Text of the kernels of ``mhc::replay``: several sites whose mappings are known.

Nothing is summed over channels, so a program owns a block of the channels of one token, holds its
streams, and takes them through all sites; the number of sites is unrolled.
"""

from collections.abc import Iterator
from functools import cache

from mhc_compile.kernels.spec import REPLAYED, SiteSpec
from mhc_compile.kernels.triton.emit_post import (
    block_of_one_token,
    carried,
    load_row,
    load_streams,
    stream,
)
from mhc_compile.kernels.triton.maps import Maps, site_maps
from mhc_compile.kernels.triton.text import Kernel, assign, numbered


def replay_name(posts: int, reads: int) -> str:
    """The kernel that makes so many states, and so many branch inputs."""
    return f"replay_{posts}_{reads}"


@cache
def replay_kernel(spec: SiteSpec, posts: int, reads: int) -> Kernel:
    """One of ``mhc::replay``.

    Args:
        spec: a dynamic site, like all that are replayed.
        posts: states to make, at most `REPLAYED`.
        reads: branch inputs to make: as many, or one more, which is read out of the given state.
    """
    n, maps = spec.streams, site_maps(spec)

    def site(s: int) -> Iterator[str]:
        yield f"f = read(F{s} + t * C + c, live)"
        for i in range(n):
            for line in load_row(spec, i, "t", "tl.load({})"):
                yield line.replace("H_POST", f"H_POST{s}").replace("H_RES", f"H_RES{s}")
            yield from assign(f"y{i}", carried(spec, i))
        for i in range(n):
            yield f"y{i} = y{i}.to(STREAM)"
            yield f"tl.store({stream(f'Y{s} + row', i)}, y{i}, mask=live)"
            yield f"x{i} = y{i}.to(tl.float32)"

    def body() -> Iterator[str]:
        yield from block_of_one_token(n)
        yield from load_streams(n, "X + row", "x")
        if reads > posts:
            yield from _read(maps, 0)
        for s in range(posts):
            yield from site(s)
            yield from _read(maps, s + reads - posts)

    return Kernel(
        name=replay_name(posts, reads),
        comment=(
            "X'_i = sum_j H_res[i, j] X_j + H_post[i] f, u = sum_i H_pre[i] X'_i, site by site.\n"
            "One token, BC channels a program."
        ),
        streams=("X", *numbered("F", posts), *numbered("Y", posts), *numbered("U", reads)),
        floats=(
            *(*numbered("H_POST", posts), *numbered("H_RES", posts)),
            *(*numbered("SAVED", reads), *numbered("BIAS", reads), *numbered("ALPHA", reads)),
        ),
        constants=("C", "BC"),
        body=tuple(body()),
    )


def replay_kernels(spec: SiteSpec) -> list[Kernel]:
    """The longest, which stands for the others where kernels are listed, compiled and counted."""
    return [replay_kernel(spec, REPLAYED, REPLAYED + 1)]


def _read(maps: Maps, k: int) -> Iterator[str]:
    """u, with H_pre from (16) and (17)."""
    eps = f" + {maps.pre_eps!r}" if maps.pre_eps else ""
    yield f"saved = SAVED{k} + t * {maps.saved}"
    yield f"alpha = tl.load(ALPHA{k})"
    for s in range(maps.norms):
        yield f"inverse{s} = tl.load(saved + {maps.width + s})"
    for i in range(maps.streams):
        hidden = f"tl.load(saved + {i}) * inverse{i % maps.norms}"
        hidden = f"tanh({hidden})" if maps.gate == "tanh" else hidden
        yield f"h{i} = alpha * ({hidden}) + tl.load(BIAS{k} + {i})"
        yield f"w{i} = {f'h{i}' if maps.gate == 'tanh' else f'tl.sigmoid(h{i})'}{eps}"
    yield from assign("u", [f"w{i} * x{i}" for i in range(maps.streams)])
    yield f"tl.store(U{k} + t * C + c, u, mask=live)"
