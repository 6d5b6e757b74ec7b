"""The generated functions called with tensors: a `mhc_compile.kernels.select.Launcher`.

Results have the shapes and dtypes of the ops' own bodies. Callers have asked `select.obstacle`
before: tensors are on the CPU, and streams in a dtype of `STREAM_TYPES`.
"""

from mhc_compile.kernels.cpp.launch_apart import phi_backward
from mhc_compile.kernels.cpp.launch_ends import (
    collapse,
    collapse_backward,
    read,
    read_backward,
    sinkhorn,
    sinkhorn_backward,
)
from mhc_compile.kernels.cpp.launch_replay import replay
from mhc_compile.kernels.cpp.launch_seam import seam, seam_backward
from mhc_compile.kernels.cpp.launch_seam_norm import seam_norm, seam_norm_backward
from mhc_compile.kernels.cpp.launch_site import (
    mix,
    post,
    post_backward,
    post_backward_branch,
    post_backward_state,
    pre,
    pre_backward,
)

__all__ = [
    "collapse",
    "collapse_backward",
    "mix",
    "phi_backward",
    "post",
    "post_backward",
    "post_backward_branch",
    "post_backward_state",
    "pre",
    "pre_backward",
    "read",
    "read_backward",
    "replay",
    "seam",
    "seam_backward",
    "seam_norm",
    "seam_norm_backward",
    "sinkhorn",
    "sinkhorn_backward",
]
