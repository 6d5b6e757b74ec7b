"""What the generated C++ can run, and why not the rest."""

from functools import cache

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.emit import STREAM_TYPES
from mhc_compile.kernels.cpp.launch import library
from mhc_compile.kernels.spec import SiteSpec

_STREAMS = range(2, 9)


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
    if any(t is not None and t.dtype == torch.float64 for t in (*tensors, branch)):
        return "an argument is float64"
    if branch is not None and torch.promote_types(branch.dtype, X.dtype) != X.dtype:
        return f"the branch output is {branch.dtype}, wider than its streams"
    if spec.dim != -1:
        return f"channels are on axis {spec.dim}, not the last"
    if spec.streams not in _STREAMS:
        return f"it has {spec.streams} streams, not {_STREAMS[0]} to {_STREAMS[-1]}"
    if not spec.dynamic:
        return "its mappings are static"
    if not constraint_of(spec).generated:
        return f"constraint {spec.constraint!r} has no generated C++"
    return None


@cache
def build_failure(spec: SiteSpec, dtype: torch.dtype) -> str | None:
    """Why there is no library for this site."""
    try:
        library(spec, dtype)
    except KernelError as error:
        return str(error)
    return None
