"""Which implementation runs an op: one decision, with its reason."""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from mhc_compile.errors import KernelError, MHCWarning
from mhc_compile.kernels.cpp import launch as cpp_launch
from mhc_compile.kernels.cpp import select as cpp
from mhc_compile.kernels.layout import PreGradients, SeamGradients, SeamNormGradients
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch as triton_launch
from mhc_compile.kernels.triton import select as triton

_LOG = logging.getLogger(__name__)


class Launcher(Protocol):
    """Fused kernels behind the ops: arguments and results are those of the ops' own bodies.

    ``shapes`` are those of h_post, h_res and saved (`mhc_compile.kernels.ops_pre`).
    """

    def pre(
        self,
        X: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor,
        alpha: torch.Tensor | None,
        spec: SiteSpec,
        shapes: Sequence[Sequence[int]],
        gates: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::pre``; a single pass has gates."""

    def pre_backward(
        self,
        du: torch.Tensor,
        dh_post: torch.Tensor,
        dh_res: torch.Tensor,
        X: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor,
        alpha: torch.Tensor | None,
        saved: torch.Tensor,
        spec: SiteSpec,
        dX_more: torch.Tensor | None = None,
        with_dz: bool = False,
        gates: torch.Tensor | None = None,
    ) -> PreGradients:
        """``mhc::pre_backward``, or ``mhc::pre_backward_dz``; a single pass has gates."""

    def read(self, X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """``mhc::read``."""

    def read_backward(
        self, du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor, spec: SiteSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``mhc::read_backward``."""

    def post(
        self,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        spec: SiteSpec,
    ) -> torch.Tensor:
        """``mhc::post``."""

    def mix(self, X: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """``mhc::mix``."""

    def post_backward(
        self,
        dY: torch.Tensor,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        spec: SiteSpec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::post_backward``."""

    def post_backward_branch(
        self, dY: torch.Tensor, h_post: torch.Tensor, dtype: torch.dtype, spec: SiteSpec
    ) -> torch.Tensor:
        """``mhc::post_backward_branch``."""

    def post_backward_state(
        self,
        dY: torch.Tensor,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        spec: SiteSpec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::post_backward_state``."""

    def seam(
        self,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor,
        alpha: torch.Tensor | None,
        spec: SiteSpec,
        shapes: Sequence[Sequence[int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::seam``."""

    def seam_backward(
        self,
        dX_next: torch.Tensor,
        du: torch.Tensor,
        dh_post_next: torch.Tensor,
        dh_res_next: torch.Tensor,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor,
        alpha: torch.Tensor | None,
        saved: torch.Tensor,
        spec: SiteSpec,
        with_dz: bool = False,
    ) -> SeamGradients:
        """``mhc::seam_backward``, or ``mhc::seam_backward_dz``."""

    def seam_norm(
        self,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        phi: torch.Tensor,
        bias: torch.Tensor,
        alpha: torch.Tensor,
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,
        spec: SiteSpec,
        shapes: Sequence[Sequence[int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::seam_norm``; the last of ``shapes`` is that of the statistics."""

    def seam_norm_backward(
        self,
        dX_next: torch.Tensor,
        dy: torch.Tensor,
        dh_post_next: torch.Tensor,
        dh_res_next: torch.Tensor,
        X: torch.Tensor,
        f: torch.Tensor,
        h_post: torch.Tensor,
        h_res: torch.Tensor,
        phi: torch.Tensor,
        bias: torch.Tensor,
        alpha: torch.Tensor,
        weight: torch.Tensor | None,
        shift: torch.Tensor | None,
        saved: torch.Tensor,
        statistics: torch.Tensor,
        spec: SiteSpec,
    ) -> SeamNormGradients:
        """``mhc::seam_norm_backward``."""

    def phi_backward(
        self,
        dz: torch.Tensor,
        X: torch.Tensor,
        f: torch.Tensor | None,
        h_post: torch.Tensor | None,
        h_res: torch.Tensor | None,
        phi: torch.Tensor,
        spec: SiteSpec,
    ) -> torch.Tensor:
        """``mhc::phi_backward``."""

    def replay(
        self,
        X: torch.Tensor,
        f: Sequence[torch.Tensor],
        h_post: Sequence[torch.Tensor],
        h_res: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        bias: Sequence[torch.Tensor],
        alpha: Sequence[torch.Tensor],
        spec: SiteSpec,
    ) -> list[torch.Tensor]:
        """``mhc::replay``."""

    def collapse(
        self,
        X: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor | None,
        alpha: torch.Tensor | None,
        mode: str,
        spec: SiteSpec,
    ) -> torch.Tensor:
        """``mhc::collapse``."""

    def collapse_backward(
        self,
        dx: torch.Tensor,
        X: torch.Tensor,
        phi: torch.Tensor | None,
        bias: torch.Tensor,
        alpha: torch.Tensor | None,
        spec: SiteSpec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``mhc::collapse_backward``."""

    def sinkhorn(self, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
        """``mhc::sinkhorn``."""

    def sinkhorn_backward(
        self, grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec
    ) -> torch.Tensor:
        """``mhc::sinkhorn_backward``."""


def launcher(
    op: str,
    spec: SiteSpec,
    X: torch.Tensor,
    *tensors: torch.Tensor | None,
    branch: torch.Tensor | None = None,
) -> Launcher | None:
    """Decide what runs ``op``: fused kernels, or None for the plain torch body of the op.

    With ``spec.kernels`` "reference" it is plain torch; with "auto" the fused kernels of the device
    wherever they can, C++ on a CPU and Triton elsewhere, and the reason is logged where they
    cannot.

    Args:
        op: name of the op, for messages.
        spec: the site.
        X: the state.
        tensors: the other floating point arguments, where there.
        branch: the branch output, which must not be rounded before it is added.

    Raises:
        KernelError: ``spec.kernels`` is "cpp" or "triton" and that cannot run it; says why.
    """
    if spec.kernels == "reference":
        return None
    kind = spec.kernels
    if kind == "auto":
        kind = "cpp" if X.device.type == "cpu" else "triton"
    failure = None
    if kind == "triton":
        reason = triton.obstacle(spec, X, *tensors, branch=branch)
    else:
        reason = cpp.obstacle(spec, X, *tensors, branch=branch)
        if reason is None:
            learned = any(tensor is not None for tensor in tensors)
            failure = cpp.build_failure(spec, X.dtype, cpp.parts(op, spec, learned))
    if reason is None and failure is None:
        return triton_launch if kind == "triton" else cpp_launch
    if spec.kernels == kind:
        raise KernelError(
            f"{op}: kernels={kind!r} cannot run this site: {reason or failure}; use "
            "kernels='auto' to have the torch reference in such cases"
        )
    if failure is None:
        _log(f"{op} runs as plain torch: {reason}")
    else:
        _warn(f"mhc ops run as plain torch, which is slower: {failure}")
    return None


@cache  # once each
def _log(message: str) -> None:
    _LOG.info(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, MHCWarning, stacklevel=4)
