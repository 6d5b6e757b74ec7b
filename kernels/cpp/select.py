"""What the generated C++ can run, and why not the rest."""

from functools import cache

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.cpp.call import library
from mhc_compile.kernels.cpp.emit import STREAM_TYPES, Part
from mhc_compile.kernels.obstacles import rounding_obstacle
from mhc_compile.kernels.spec import SiteSpec


def obstacle(
    spec: SiteSpec,
    X: torch.Tensor,
    *tensors: torch.Tensor | None,
    branch: torch.Tensor | None = None,
) -> str | None:
    """Why the generated C++ cannot take these arguments; None if it can.

    Args:
        spec: the site.
        X: the state.
        tensors: the other floating point arguments, where there.
        branch: the branch output, which must not be rounded before it is added.
    """
    if X.device.type != "cpu":
        return f"the state is on {X.device}"
    if X.dtype not in STREAM_TYPES:
        return f"streams are {X.dtype}, not {' or '.join(map(str, STREAM_TYPES))}"
    return rounding_obstacle(X, *tensors, branch=branch)


def parts(op: str, spec: SiteSpec, learned: bool) -> tuple[Part, ...]:
    """The libraries that an op of a site needs.

    Args:
        op: its name.
        spec: the site.
        learned: whether a collapse has parameters.
    """
    if op.startswith("mhc::sinkhorn"):
        return ("sinkhorn",)
    if op.startswith("mhc::collapse"):
        return ("head" if learned and spec.dynamic else "ends",)
    if op.startswith("mhc::read"):
        return ("ends",)
    if op.startswith("mhc::seam_norm"):
        return ("normed",)
    if op == "mhc::replay":
        return ("replay",)
    if op == "mhc::mix":
        return ("mix",)
    if spec.dynamic or op.startswith("mhc::post"):
        return ("site",)
    return ("ends",) if op.startswith("mhc::pre") else ("ends", "site")


@cache
def build_failure(spec: SiteSpec, dtype: torch.dtype, needed: tuple[Part, ...]) -> str | None:
    """Why there are no libraries for this site."""
    try:
        for part in needed:
            library(spec, dtype, part)
    except KernelError as error:
        return str(error)
    return None
