"""MLIR of graphs before and after: readable with operators, runnable without torch."""

import sys

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from mhc_compile import cli, mlir
from mhc_compile.errors import ConfigError
from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.mlir import to_mlir, to_module

WIDTH = 8


def _block(*, constraint: str = "sinkhorn") -> tuple[GraphModule, tuple[torch.Tensor, ...]]:
    """One site around a small branch, forward and backward, as a graph of ATen and mhc ops."""
    spec = SiteSpec(streams=3, constraint=constraint)
    weight = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    tensors = initial_parameters(spec, WIDTH, "preserve", 0)
    parameters = [tensors[name] + 0.3 * torch.randn_like(tensors[name]) for name in sorted(tensors)]
    X = torch.randn(2, 5, 3, WIDTH)

    def block(
        X: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, phi: torch.Tensor
    ) -> object:
        inputs = [t.detach().requires_grad_() for t in (X, alpha, bias, phi)]
        u, h_post, h_res, _ = torch.ops.mhc.pre(
            inputs[0], inputs[3], inputs[2], inputs[1], spec.encode()
        )
        out = torch.ops.mhc.post(inputs[0], torch.tanh(u @ weight), h_post, h_res, spec.encode())
        return (out, *torch.autograd.grad(out.square().sum(), inputs))

    return make_fx(block)(X, *parameters), (X, *parameters)


def test_without_torch_mlir_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)
    mlir._torch_mlir.cache_clear()
    assert cli.main(["dump", "hf:gpt2", "--format", "mlir"]) == 2
    assert "pip install 'mhc-compile[mlir]'" in capsys.readouterr().err
    mlir._torch_mlir.cache_clear()


@pytest.mark.parametrize("dialect", ["linalg", "stablehlo", "tosa"])
def test_opaque_operators_are_refused_where_the_dialect_has_none(dialect: str) -> None:
    with pytest.raises(ConfigError, match="use mlir_custom='decompose'"):
        mlir.check_mlir(dialect, "opaque")


def test_torch_dialect_shows_the_mhc_ops_and_no_weights() -> None:
    pytest.importorskip("torch_mlir")
    graph, _ = _block()
    text = to_mlir(graph)
    for op in ("pre", "post", "pre_backward", "post_backward"):
        assert text.count(f'torch.operator "torch.mhc.{op}"') == 1
    assert '"0x' not in text
    assert text == to_mlir(graph)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["torch", "linalg", "stablehlo", "tosa"])
def test_written_out_no_operator_is_left_in_any_dialect(dialect: str) -> None:
    pytest.importorskip("torch_mlir")
    graph, _ = _block()
    text = to_mlir(graph, dialect=dialect, custom="decompose")
    assert "torch.operator" not in text
    assert "func.func @main" in text
    assert (" = torch." in text) == (dialect == "torch")


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["sinkhorn", "sinkhorn_softmax"])
def test_linalg_runs_without_torch_and_agrees_with_eager(constraint: str) -> None:
    pytest.importorskip("torch_mlir")
    from tests.mlir_engine import run_linalg

    graph, inputs = _block(constraint=constraint)
    expected = [t.detach() for t in graph(*inputs)]
    module = to_module(graph, dialect="linalg", custom="decompose")
    for found, eager in zip(run_linalg(module, inputs, expected), expected, strict=True):
        assert_close(found, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["sinkhorn", "permutations"])
def test_another_compiler_of_linalg_agrees_with_eager(constraint: str) -> None:
    pytest.importorskip("torch_mlir")
    pytest.importorskip("iree.compiler")
    from tests.mlir_engine import run_iree

    graph, inputs = _block(constraint=constraint)
    expected = [t.detach() for t in graph(*inputs)]
    module = to_module(graph, dialect="linalg", custom="decompose")
    for found, eager in zip(run_iree(module, inputs), expected, strict=True):
        assert_close(found, eager, rtol=1e-5, atol=1e-5)
