"""What mHC needs of ``torch.distributed`` beyond what torch has itself.

DDP, FSDP2, tensor parallelism and pipelines are torch's own, around a converted model: convert,
parallelize, compile, shard. Here is only what they cannot know.
"""

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mhc_compile.convert import mhc_parameters


def all_reduce_gradients_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of all mhc parameters over a sequence-parallel mesh, in place.

    Under sequence parallelism each rank of the tensor-parallel mesh mixes the streams of its own
    tokens, so that it holds a part of the gradient of every mhc parameter. Call this once a step,
    after the last backward and before gradients are clipped or used. Without sequence parallelism
    every rank has the whole gradient already, and this would count it several times.

    Args:
        model: a converted model; also one whose parameters FSDP2 has sharded over another mesh.
        mesh: the one-dimensional mesh over which the sequence is split.
    """
    gradients = [p.grad for _, p in mhc_parameters(model) if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if not local:
        return
    flat = torch.cat([gradient.flatten() for gradient in local])  # one message for all
    dist.all_reduce(flat, group=mesh.get_group())
    parts = torch.split(flat, [gradient.numel() for gradient in local])
    for gradient, part in zip(local, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
