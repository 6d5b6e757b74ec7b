"""Which implementation runs an op: one decision, with its reason."""

import logging
import warnings
from functools import cache

import torch

from mhc_compile.errors import KernelError, MHCWarning
from mhc_compile.kernels.cpp.emit import STREAM_TYPES
from mhc_compile.kernels.cpp.launch import library
from mhc_compile.kernels.spec import SiteSpec

_LOG = logging.getLogger(__name__)
_STREAMS = range(2, 9)


def use_cpp(op: str, spec: SiteSpec, X: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """Decide whether the generated C++ runs ``op``, or the plain torch reference.

    With ``spec.kernels`` "reference" it never does; with "auto" it does wherever it can, and the
    reason is logged where it cannot.

    Args:
        op: name of the op, for messages.
        spec: the site.
        X: the state.
        tensors: the other floating point arguments, where there.

    Raises:
        KernelError: ``spec.kernels`` is "cpp" and the C++ cannot run it; says why.
    """
    if spec.kernels == "reference":
        return False
    reason = obstacle(spec, X, *tensors) or _build_failure(spec, X.dtype)
    if reason is None:
        return True
    if spec.kernels == "cpp":
        raise KernelError(
            f"{op}: kernels='cpp' cannot run this site: {reason}; use kernels='auto' to have the "
            "torch reference in such cases"
        )
    _log(op, reason)
    return False


def obstacle(spec: SiteSpec, X: torch.Tensor, *tensors: torch.Tensor | None) -> str | None:
    """Why the generated C++ cannot take these arguments; None if it can."""
    if X.device.type != "cpu":
        return f"the state is on {X.device}"
    if X.dtype not in STREAM_TYPES:
        return f"streams are {X.dtype}, not {' or '.join(map(str, STREAM_TYPES))}"
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "an argument is float64"
    if spec.dim != -1:
        return f"channels are on axis {spec.dim}, not the last"
    if spec.streams not in _STREAMS:
        return f"it has {spec.streams} streams, not {_STREAMS[0]} to {_STREAMS[-1]}"
    if not spec.dynamic:
        return "its mappings are static"
    return None


@cache
def _build_failure(spec: SiteSpec, dtype: torch.dtype) -> str | None:
    """Why there is no library for this site; the user is told once, as this costs speed."""
    try:
        library(spec, dtype)
    except KernelError as error:
        if spec.kernels == "auto":
            warnings.warn(
                f"mhc ops run as plain torch, which is slower: {error}", MHCWarning, stacklevel=2
            )
        return str(error)
    return None


@cache
def _log(op: str, reason: str) -> None:
    _LOG.info("%s runs as plain torch: %s", op, reason)
