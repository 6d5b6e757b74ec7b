"""What an ahead-of-time compiler has to know: types, constants and options of every kernel."""

import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import kernels
from mhc_compile.kernels.triton.maps import maps_of
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.tiles import tile

STREAM_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

Variant = tuple[str, dict[str, str], dict[str, int | str], dict[str, int | bool]]
"""A kernel's name, the types of its run-time arguments, its constants, its compile options."""


def aot_variants(spec: SiteSpec, dtype: torch.dtype, channels: int, target: str) -> list[Variant]:
    """Every kernel of a site as it is launched.

    Args:
        spec: the site.
        dtype: of the streams.
        channels: width C.
        target: one of `TARGETS`.
    """
    found: list[Variant] = []
    for name, kernel in kernels(spec).items():
        chosen = tile(name, maps_of(name, spec), channels, dtype, TARGETS[target])
        signature = dict.fromkeys(kernel.streams, STREAM_POINTERS[dtype])
        signature |= dict.fromkeys(kernel.floats, "*fp32")
        signature |= dict.fromkeys(kernel.integers, "i32")
        options: dict[str, int | bool] = {
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
            "enable_fp_fusion": True,
        }
        found.append((name, signature, chosen.constants, options))
    return found
