"""Small residual networks, and what tests do with them."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import mhc_compile

WIDTH = 8
Trace = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Output of a run, and the gradient of each parameter that has one."""


class Block(nn.Module):
    """A pre-norm block of two sites."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear, self.linear2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.linear(self.norm(x)))
        return x + torch.relu(self.linear2(self.norm2(x)))


class Net(nn.Module):
    """Stem, a trunk of blocks, head."""

    def __init__(self, blocks: Iterable[nn.Module] | int = 2, width: int = WIDTH) -> None:
        super().__init__()
        if isinstance(blocks, int):
            blocks = [Block(width) for _ in range(blocks)]
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PostNormBlock(nn.Module):
    """One site whose sum is normed on the trunk, as in BERT."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.linear(x)))


def example(*shape: int) -> torch.Tensor:
    """A random input."""
    return torch.randn(*(shape or (2, 5)), WIDTH)


def perturb_(model: nn.Module, scale: float = 0.3) -> None:
    """Move every mHC parameter, so that streams differ and each parameter matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in mhc_compile.mhc_parameters(model):
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with the mhc backend."""
    return torch.compile(model, backend="mhc", options={"inner": inner, **options})


def compile_blocks_(blocks: Iterable[nn.Module], inner: str = "eager", **options: Any) -> None:
    """Compile each block on its own, in place."""
    for block in blocks:
        block.compile(backend="mhc", options={"inner": inner, **options})


def run(call: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """Call, go backward from a fixed projection of the output, collect gradients by name.

    Args:
        call: ``model`` or something compiled from it.
        model: whose gradients to collect; they are reset before.
        *args: of the call.
        **kwargs: of the call.
    """
    model.zero_grad(set_to_none=True)
    output = call(*args, **kwargs)
    generator = torch.Generator().manual_seed(3)
    (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum().backward()
    gradients = {
        name.replace("_orig_mod.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return output.detach(), gradients


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def assert_same(found: Trace, expected: Trace, output: float = 1e-6, grad: float = 1e-6) -> None:
    """Same output, and the same gradient for every parameter of ``expected``.

    ``grad`` is relative to the largest gradient of all: some mHC gradients are rounding noise.
    """
    assert distance(found[0], expected[0]) <= output
    assert expected[1].keys() <= found[1].keys()
    scale = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= grad * scale, name


def converted(model: nn.Module, *args: Any, perturbed: bool = True, **config: Any) -> nn.Module:
    """``model`` converted in place."""
    mhc_compile.convert_(model, *args, config=mhc_compile.MHCConfig(**config))
    if perturbed:
        perturb_(model)
    return model


def compiled_graphs() -> int:
    """How many graphs Dynamo has handed to a backend since its counters were cleared."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def saved_shapes(call: Callable[[], Any]) -> Counter[tuple[int, ...]]:
    """Shapes of everything that one call saves for its backward, each storage once."""
    shapes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return Counter(shapes.values())
