"""The kernels of `mhc_compile.kernels.triton.emit_matrix` called with tensors."""

import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit_matrix import TILE, matrix_source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.site import on_device


def make_matrix(logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """H_res ``[..., n, n]`` in the dtype of the logits, which have its shape."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _run("make_matrix", spec, logits, out)
    return out


def make_matrix_backward(grad: torch.Tensor, logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """The gradient of the logits from that of `make_matrix`."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _run("make_matrix_backward", spec, grad, logits, out)
    return out


def _run(kernel: str, spec: SiteSpec, *tensors: torch.Tensor) -> None:
    out = tensors[-1]
    tokens = out.shape[:-2].numel()
    grid = (-(-tokens // int(TILE.constants["BT"])),)
    if tokens:
        with on_device(out.device):
            getattr(load(matrix_source(spec)), kernel)[grid](
                *(tensor.contiguous() for tensor in tensors),
                tokens,
                **TILE.constants,
                num_warps=TILE.warps,
                num_stages=TILE.stages,
                enable_fp_fusion=True,  # Triton 3.10 turns it off by default
            )
