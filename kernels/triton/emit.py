"""From a site's specification to its Triton source: pure functions of strings.

Everything is unrolled over the streams, each a variable of its own, so that no number of streams
is padded. Numbers in parentheses are equations of arXiv 2512.24880.
"""

from functools import cache

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_backward import backward_kernels, maps_backward_function
from mhc_compile.kernels.triton.emit_ends import end_kernels
from mhc_compile.kernels.triton.emit_norm import NORM_HELPER
from mhc_compile.kernels.triton.emit_post import post_kernels
from mhc_compile.kernels.triton.emit_pre import maps_function, pre_kernels
from mhc_compile.kernels.triton.emit_replay import replay_kernel, replay_kernels
from mhc_compile.kernels.triton.emit_static import read_kernels, static_kernels
from mhc_compile.kernels.triton.maps import Maps, head_maps, site_maps, vector
from mhc_compile.kernels.triton.text import Kernel

STREAM_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The dtypes that streams can have, and their names in ``triton.language``."""


@cache
def kernels(spec: SiteSpec) -> dict[str, Kernel]:
    """Every kernel of a site, by name."""
    found = [*post_kernels(spec), *end_kernels(spec), *read_kernels(spec)]
    if spec.dynamic and not spec.single_pass:
        found += replay_kernels(spec)
    for maps in _all_maps(spec):
        if spec.dynamic:
            found += [*pre_kernels(spec, maps), *backward_kernels(spec, maps)]
        else:
            found += static_kernels(spec, maps)
    return {kernel.name: kernel for kernel in found}


@cache
def source(spec: SiteSpec, dtype: torch.dtype) -> str:
    """The module that holds the kernels of one site.

    Args:
        spec: the site; its ``dim`` and ``kernels`` do not matter.
        dtype: of the streams, one of `STREAM_TYPES`.

    Returns:
        Python text that imports nothing but triton.
    """
    functions = [_HELPERS, constraint_of(spec).triton(spec)]
    if spec.branch_norm != "none":
        functions.append(NORM_HELPER)
    if spec.dynamic:
        for maps in _all_maps(spec):
            functions += [maps_function(spec, maps), maps_backward_function(spec, maps)]
    texts = (kernel.text() for kernel in kernels(spec).values())
    return "\n\n".join(text for text in (_head(spec, dtype), *functions, *texts) if text)


def _all_maps(spec: SiteSpec) -> tuple[Maps, ...]:
    """The site's, and those of its learned collapse; a single pass has none."""
    return (site_maps(spec),) if spec.single_pass else (site_maps(spec), head_maps(spec))


@cache
def replay_source(spec: SiteSpec, dtype: torch.dtype, posts: int, reads: int) -> str:
    """The module that holds the `replay_kernel` of so many sites."""
    return "\n\n".join((_head(spec, dtype), _HELPERS, replay_kernel(spec, posts, reads).text()))


def _head(spec: SiteSpec, dtype: torch.dtype) -> str:
    return f'''\
"""mHC kernels, generated: {spec.streams} streams of {STREAM_TYPES[dtype]}, {spec.constraint}."""

import triton
import triton.language as tl

STREAM = tl.constexpr(tl.{STREAM_TYPES[dtype]})
VECTOR = tl.constexpr({vector(dtype)})  # stream elements that a thread reads at once
'''


_HELPERS = """\
@triton.jit
def read(at, live):
    # All arithmetic is float32.
    return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def by_vector(v, BC: tl.constexpr):
    # Sums of what each thread holds.
    return tl.sum(tl.reshape(v, (BC // VECTOR, VECTOR)), 1)


@triton.jit
def tanh(x):
    # Near 0 by its series: 1 - exp(-2 x) would cancel.
    q = x * x
    series = x * (1.0 - q * (1.0 / 3.0 - q * (2.0 / 15.0 - q * (17.0 / 315.0 - q * 62.0 / 2835.0))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(q < 0.04, series, tl.where(x < 0.0, -far, far))
"""
