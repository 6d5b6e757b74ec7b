"""From a site's specification to its Triton source: pure functions of strings.

Everything is unrolled over the streams, each a variable of its own, so that no number of streams
is padded. Numbers in parentheses are equations of arXiv 2512.24880.
"""

from functools import cache

import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_post import post_kernels
from mhc_compile.kernels.triton.maps import vector
from mhc_compile.kernels.triton.text import Kernel

STREAM_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The dtypes that streams can have, and their names in ``triton.language``."""


@cache
def kernels(spec: SiteSpec) -> dict[str, Kernel]:
    """Every kernel of a site, by name."""
    return {kernel.name: kernel for kernel in post_kernels(spec)}


@cache
def source(spec: SiteSpec, dtype: torch.dtype) -> str:
    """The module that holds the kernels of one site.

    Args:
        spec: the site; its ``dim`` and ``kernels`` do not matter.
        dtype: of the streams, one of `STREAM_TYPES`.

    Returns:
        Python text that imports nothing but triton.
    """
    texts = (kernel.text() for kernel in kernels(spec).values())
    parts = (_head(spec, dtype), _HELPERS, *texts)
    return "\n\n".join(parts)


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
"""
