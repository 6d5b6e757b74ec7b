"""Capture a model, rewrite its hyper-connections, and compare what both compute."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile._torch_private import copy_captured
from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.chains import Chain, rewrite_chains_pass
from mhc_compile.passes.opnames import raw_name


class Rewritten:
    """A backend that rewrites each graph, and what it found."""

    def __init__(self, *, kernels: str = "reference") -> None:
        self.kernels = kernels
        self.chains: list[Chain] = []
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        graph, _ = copy_captured(gm)
        self.rewrite(graph)
        return graph.forward

    def rewrite(self, gm: GraphModule) -> None:
        canonicalize_pass(gm, ())
        rewrite_chains_pass(gm, (), kernels=self.kernels, found=self.chains)
        gm.graph.lint()
        gm.recompile()
        self.graphs.append(gm)

    @property
    def ops(self) -> list[str]:
        """Names of the mhc ops in the graphs."""
        names = [raw_name(node) for gm in self.graphs for node in gm.graph.nodes]
        return [name.removeprefix("mhc.") for name in names if name.startswith("mhc.")]

    @property
    def kinds(self) -> list[str]:
        """Kinds of the pieces that were replaced."""
        return [chain.kind for chain in self.chains if not chain.reason]

    @property
    def reasons(self) -> list[str]:
        """Why pieces stay."""
        return [chain.reason for chain in self.chains if chain.reason]


def rewritten(model: Callable[..., object], *inputs: torch.Tensor, **settings: str) -> Rewritten:
    """What the pass makes of the Dynamo graphs of one call."""
    backend = Rewritten(**settings)
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*inputs)
    return backend


def assert_same(
    model: nn.Module, *inputs: torch.Tensor, tolerance: float, kernels: str = "reference"
) -> Rewritten:
    """Compare outputs and all gradients of ``model`` with those of its rewritten graph."""
    backend = Rewritten(kernels=kernels)
    torch._dynamo.reset()
    right, right_gradients = run(model, model, *inputs)
    mine, my_gradients = run(torch.compile(model, backend=backend), model, *inputs)
    compare(mine, right, tolerance)
    compare_gradients(my_gradients, right_gradients, tolerance)
    return backend


def compare_gradients(
    mine: Sequence[torch.Tensor | None], right: Sequence[torch.Tensor | None], tolerance: float
) -> None:
    """`compare`, for each; a gradient that should be zero is rounding noise of the others."""
    largest = max(g.norm().item() for g in right if g is not None)
    for my_gradient, right_gradient in zip(mine, right, strict=True):
        compare(my_gradient, right_gradient, tolerance, floor=1e-2 * largest)


def run(
    call: Callable[..., torch.Tensor], model: nn.Module, *inputs: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Output, and gradients of inputs and parameters for one fixed weighting of the output."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = call(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad] + list(model.parameters())
    return out, list(torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True))


def compare(
    mine: torch.Tensor | None, right: torch.Tensor | None, tolerance: float, floor: float = 0.0
) -> None:
    """Relative error in the norm; what has no gradient on one side has none on the other."""
    if mine is None or right is None:
        assert mine is None or not mine.any()
        assert right is None or not right.any()
        return
    assert mine.dtype == right.dtype
    assert mine.shape == right.shape
    assert (mine - right).norm() <= tolerance * max(right.norm().item(), floor)
