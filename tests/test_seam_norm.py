"""The option ``seam_norm``, from the model to its gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import ConfigError
from mhc_compile.passes.opnames import op_name

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Two residual branches, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-5)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.first(x))[..., :16].tanh()
        return x + self.down(self.up(self.second(x)).relu())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), nn.LayerNorm(16))
    mhc_compile.convert_(net, X)
    with torch.no_grad():
        for _, parameter in mhc_compile.mhc_parameters(net):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def step(net: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """Output and all gradients."""
    torch._dynamo.reset()
    net.zero_grad()
    compiled = torch.compile(net, backend="mhc", options={"inner": "aot_eager", **options})
    out = compiled(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def ops_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*after*.txt"))


def test_a_training_step_is_the_same_with_norms_inside_the_seams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    plain = step(net, X, recompute="off")
    monkeypatch.setenv("MHC_DUMP", str(tmp_path))
    joined = step(net, X, recompute="off", seam_norm=True)
    assert ops_of(tmp_path).count("mhc.seam_norm") > 0
    assert "mhc.seam(" not in ops_of(tmp_path)
    for ours, theirs in zip(joined, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_with_recomputation_a_training_step_is_bitwise_what_it_was() -> None:
    net = model()
    plain, joined = step(net, X), step(net, X, seam_norm=True)
    assert all(map(torch.equal, joined, plain))


def test_inference_joins_norms_whatever_a_backward_would_make_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    monkeypatch.setenv("MHC_DUMP", str(tmp_path))
    with torch.no_grad():
        expected = torch.compile(net, backend="mhc", options={"inner": "aot_eager"})(X)
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "seam_norm": True}
        found = torch.compile(net, backend="mhc", options=options)(X)
    assert ops_of(tmp_path).count("mhc.seam_norm") > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_rewritten_module_joins_norms() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block())
    config = mhc_compile.MHCConfig(seam_norm=True)
    module = mhc_compile.rewrite(net, X, config=config)
    assert [op_name(n) for n in module.graph.nodes].count("mhc.seam_norm") == 3
    torch.testing.assert_close(module(X), net(X))


def test_the_option_is_on_or_off() -> None:
    with pytest.raises(ConfigError, match="seam_norm='rms' is not allowed"):
        mhc_compile.MHCConfig(seam_norm="rms")  # type: ignore[arg-type]
