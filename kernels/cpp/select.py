"""Which implementation runs an op: one decision, with its reason."""

import logging
import warnings
from functools import cache

import torch

from mhc_compile.errors import KernelError, MHCWarning
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.cpp.emit import STREAM_TYPES
from mhc_compile.kernels.cpp.launch import library
from mhc_compile.kernels.spec import SiteSpec

_LOG = logging.getLogger(__name__)
_STREAMS = range(2, 9)


def use_cpp(
    op: str,
    spec: SiteSpec,
    X: torch.Tensor,
    *tensors: torch.Tensor | None,
    branch: torch.Tensor | None = None,
) -> bool:
    """Decide whether the generated C++ runs ``op``, or the plain torch reference.

    With ``spec.kernels`` "reference" it never does; with "auto" it does wherever it can, and the
    reason is logged where it cannot.

    Args:
        op: name of the op, for messages.
        spec: the site.
        X: the state.
        tensors: the other floating point arguments, where there.
        branch: the branch output, which must not be rounded before it is added.

    Raises:
        KernelError: ``spec.kernels`` is "cpp" and the C++ cannot run it; says why.
    """
    if spec.kernels == "reference":
        return False
    reason = obstacle(spec, X, *tensors, branch=branch)
    failure = None if reason else _build_failure(spec, X.dtype)
    if reason is None and failure is None:
        return True
    if spec.kernels == "cpp":
        raise KernelError(
            f"{op}: kernels='cpp' cannot run this site: {reason or failure}; use "
            "kernels='auto' to have the torch reference in such cases"
        )
    if failure is None:
        _log(f"{op} runs as plain torch: {reason}")
    else:
        _warn(f"mhc ops run as plain torch, which is slower: {failure}")
    return False


def obstacle(
    spec: SiteSpec,
    X: torch.Tensor,
    *tensors: torch.Tensor | None,
    branch: torch.Tensor | None = None,
) -> str | None:
    """Why the generated C++ cannot take these arguments (see `use_cpp`); None if it can."""
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
def _build_failure(spec: SiteSpec, dtype: torch.dtype) -> str | None:
    """Why there is no library for this site."""
    try:
        library(spec, dtype)
    except KernelError as error:
        return str(error)
    return None


@cache  # once each
def _log(message: str) -> None:
    _LOG.info(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, MHCWarning, stacklevel=4)
