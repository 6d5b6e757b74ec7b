"""The ops and the backend with Triton behind them, in the interpreter."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile.errors import KernelError
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch

pytestmark = pytest.mark.interpreted

OPS = torch.ops.mhc
SPEC = SiteSpec(streams=3, iters=5, kernels="triton")


def test_triton_runs_what_asks_for_it_and_the_rest_stays_with_the_cpu() -> None:
    X = torch.zeros(5, 3, 16)
    assert launcher("mhc::pre", SPEC, X) is launch
    assert launcher("mhc::pre", replace(SPEC, kernels="auto"), X) is not launch
    with pytest.raises(KernelError, match=r"kernels='triton' cannot run .*float64"):
        launcher("mhc::pre", SPEC, X.double())


def test_the_projection_alone_equals_the_reference() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 3, 3, requires_grad=True)
    grad = torch.randn(7, 3, 3)
    found, exact = (
        OPS.sinkhorn(logits, replace(SPEC, kernels=kernels).encode())
        for kernels in ("triton", "reference")
    )
    torch.testing.assert_close(found, exact)
    gradients = [torch.autograd.grad(m, logits, grad)[0] for m in (found, exact)]
    torch.testing.assert_close(*gradients)


class Net(nn.Module):
    """Three sites between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in self.branches:
            x = x + torch.tanh(branch(x))
        return x


def test_a_compiled_model_trains_on_triton_kernels() -> None:
    torch.manual_seed(0)
    x, results = torch.randn(2, 5, 16), []
    for kernels in ("triton", "reference"):
        torch.manual_seed(1)
        model = Net()
        config = mhc_compile.MHCConfig(streams=3, sinkhorn_iters=5, kernels=kernels)  # type: ignore[arg-type]
        mhc_compile.convert_(model, x, config=config)
        step = torch.compile(model, backend="mhc", options={"inner": "aot_eager"})
        output = step(x)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((output.detach(), gradients))
        torch._dynamo.reset()
    (found, gradients), (exact, others) = results
    torch.testing.assert_close(found, exact)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)
