"""The kernels of ``mhc::sinkhorn``, called with tensors."""

import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_matrix import TILE, matrix_source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.site import on_device


def sinkhorn(logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn``."""
    out = logits.new_empty(logits.shape)
    _run("make_matrix", spec, logits, out)
    return out


def sinkhorn_backward(grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """``mhc::sinkhorn_backward``."""
    out = logits.new_empty(logits.shape)
    _run("make_matrix_backward", spec, grad, logits, out)
    return out


def _run(kernel: str, spec: SiteSpec, *tensors: torch.Tensor) -> None:
    tokens = tensors[-1].shape[:-2].numel()
    grid = (-(-tokens // int(TILE.constants["BT"])),)
    dense = [tensor.contiguous() for tensor in tensors]
    with on_device(dense[0].device):
        getattr(load(matrix_source(spec)), kernel)[grid](
            *dense, tokens, **TILE.constants, num_warps=TILE.warps, enable_fp_fusion=True
        )
