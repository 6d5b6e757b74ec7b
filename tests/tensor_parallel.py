"""A residual network whose branches are tensor parallel: each ends in an all-reduce."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.fx import GraphModule

from mhc_compile import MHCConfig
from mhc_compile.backend import compile_frame
from mhc_compile.passes import split
from mhc_compile.passes.estimate import Device, device_of
from mhc_compile.recorder import Recorder
from tests.nets import Trace, compiled, converted, run


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


def recorded(net: nn.Module, **options: Any) -> tuple[Callable[..., Any], Recorder]:
    """``net`` compiled, and what is recorded of that."""
    recorder = Recorder()

    def backend(gm: GraphModule, _: Sequence[Any]) -> Any:
        return compile_frame(gm, MHCConfig(**options), frozenset(options), recorder=recorder)

    return torch.compile(net, backend=backend), recorder


def same_bits(found: Trace, expected: Trace) -> bool:
    """Whether output and all gradients are equal, shard by shard."""
    pairs = [(found[0], expected[0])]
    pairs += [(found[1][name], gradient) for name, gradient in expected[1].items()]
    return found[1].keys() == expected[1].keys() and all(
        torch.equal(_local(a), _local(b)) for a, b in pairs
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step(call: Callable[..., Any], net: nn.Module, x: torch.Tensor, train: bool) -> Trace:
    if train:
        return run(call, net, x)
    with torch.no_grad():
        return call(x), {}


def _mixings_in_windows(graph: str) -> int:
    pending, found = 0, 0
    for line in graph.splitlines():
        pending += "all_reduce.default(" in line
        pending -= "wait_tensor.default(" in line
        found += pending > 0 and "mhc.mix.default(" in line
    return found


def overlapped_step(
    rank: int, recompute: str, device: Device | None = None, train: bool = True
) -> dict[str, Any]:
    """A training step on two ranks, with and without the passes that overlap.

    Args:
        rank: of this process.
        recompute: as in `MHCConfig`.
        device: what sites are split for, if not what runs them.
        train: whether there is a backward.

    Returns:
        "equal": whether they gave the same bits; "mixed": how many times streams are mixed
        while a collective is pending; "moved": for every collective how many operations run in its
        window, before and after; "passes": which changed a graph.
    """
    x = torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(1))
    net = parallel_stack(init_device_mesh("cpu", (2,)), x, depth=2)
    plain = compiled(net, "aot_eager", overlap="off", recompute=recompute)
    expected = _step(plain, net, x, train)
    torch.compiler.reset()
    call, recorder = recorded(net, inner="aot_eager", recompute=recompute)
    with mock.patch.object(split, "device_of", lambda graph: device or device_of(graph)):
        found = _step(call, net, x, train)
    overlaps = recorder.graphs[0].overlap
    return {
        "equal": same_bits(found, expected),
        "mixed": sum(
            _mixings_in_windows(stage.text)
            for stage in recorder.stages
            if stage.name == "overlap_collectives_pass"
        ),
        "moved": [window.nodes for overlap in overlaps for window in overlap.windows],
        "passes": {stage.name for stage in recorder.stages if stage.phase.startswith("aot")},
    }
