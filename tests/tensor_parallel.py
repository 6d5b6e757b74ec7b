"""A residual network whose branches are tensor parallel: each ends in an all-reduce."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.nets import converted


class MLP(nn.Module):
    """A site: norm, then two products with the hidden axis over the ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Sites one behind the other."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.sites = nn.ModuleList(MLP(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for site in self.sites:
            x = site(x)
        return x


def parallel_stack(mesh: DeviceMesh, x: torch.Tensor, depth: int = 3) -> nn.Module:
    """A converted `Stack` for inputs like ``x``, with a plan on its branches; same on all ranks."""
    torch.manual_seed(0)
    model = converted(Stack(depth, x.shape[-1]), x)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for site in model.sites:
        parallelize_module(site, mesh, plan)
    return model
