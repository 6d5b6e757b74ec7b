"""Whether the generated Triton can run an op, and why not."""

import os
from functools import cache
from importlib.util import find_spec

import torch

from mhc_compile.kernels.obstacles import rounding_obstacle
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import STREAM_TYPES

_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
_STREAMS = range(1, 9)  # beyond, the mappings of a token alone fill the registers


def obstacle(
    spec: SiteSpec,
    X: torch.Tensor,
    *tensors: torch.Tensor | None,
    branch: torch.Tensor | None = None,
) -> str | None:
    """Why the generated Triton cannot take these arguments; None if it can.

    Args:
        spec: the site.
        X: the state.
        tensors: the other floating point arguments, where there.
        branch: the branch output, which must not be rounded before it is added.
    """
    if X.device.type not in (*_DEVICES, *(("cpu",) if interpreting() else ())):
        return f"the state is on {X.device}"
    if X.dtype not in STREAM_TYPES:
        return f"streams are {X.dtype}, not {', '.join(map(str, STREAM_TYPES))}"
    if spec.dim != -1:
        return f"channels are on axis {spec.dim}, not the last"
    if spec.streams not in _STREAMS:
        return f"it has {spec.streams} streams, not {_STREAMS[0]} to {_STREAMS[-1]}"
    if X.numel() == 0:
        return "it has no tokens"
    return rounding_obstacle(X, *tensors, branch=branch) or _missing(X.device)


def interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}, older than sm_80"
    return None
