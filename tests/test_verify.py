"""`verify` on whole models: right ones pass, and each kind of damage is found."""

import json

import pytest
import torch
from torch import nn

from mhc_compile import verify as verify_module
from mhc_compile.checks import Check
from mhc_compile.config import MHCConfig
from mhc_compile.errors import UnsupportedGraphError, VerificationError
from mhc_compile.targets import Built
from mhc_compile.verify import VerifyReport, verify


class Toy(nn.Module):
    """Two pre-norm residual layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = 0.5
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + nn.functional.dropout(torch.tanh(linear(norm(x))), self.drop, self.training)
        return x


def _build() -> Built:
    torch.manual_seed(0)
    return Toy(), (torch.randn(3, 8),), {}


def test_a_conversion_that_is_right_passes_every_check() -> None:
    told: list[str] = []
    report = verify(_build, tell=told.append)
    assert [check for check in report.checks if not check.passed] == []
    assert [check.name for check in report.checks] == [
        "outputs, eval mode",
        "gradients of old parameters, eval mode",
        "outputs, train mode",
        "gradients of old parameters, train mode",
        "row sums of H_res",
        "column sums of H_res",
        "finite differences of alpha",
        "finite differences of bias",
        "finite differences of phi",
    ]
    assert [site.name for site in report.sites] == ["add0", "add1"]
    assert told[-1] == "finite differences"
    report.raise_if_failed()
    assert json.loads(report.to_json())["passed"] is True


def test_an_init_that_moves_the_function_is_found() -> None:
    report = verify(_build, MHCConfig(collapse="sum", init="paper"))
    failed = {check.name for check in report.checks if not check.passed}
    assert {"outputs, eval mode", "outputs, train mode"} <= failed
    assert not any(name.startswith("finite differences") for name in failed)
    with pytest.raises(VerificationError, match=r"Toy: outputs, eval mode: .* > 2e-06"):
        report.raise_if_failed()


def test_too_few_iterations_are_found_in_the_columns() -> None:
    report = verify(_build, MHCConfig(sinkhorn_iters=1))
    assert [check.name for check in report.checks if not check.passed] == ["column sums of H_res"]


def test_constraints_that_are_not_doubly_stochastic_are_not_held_to_it() -> None:
    report = verify(_build, MHCConfig(constraint="none"))
    assert report.passed
    assert not any("H_res" in check.name for check in report.checks)


def test_a_model_without_residual_sites_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match="no residual"):
        verify(lambda: (nn.Linear(4, 4), (torch.randn(2, 4),), {}))


def test_a_broken_gradient_of_an_old_parameter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = verify_module._run
    calls = []

    def run_and_spoil(*args: object) -> object:
        outputs, gradients = run(*args)  # type: ignore[arg-type]
        calls.append(gradients)
        if len(calls) == 3:  # after the plain model, and the plain one in float64
            gradients["linears.0.weight"].mul_(1.001)
        return outputs, gradients

    monkeypatch.setattr(verify_module, "_run", run_and_spoil)
    report = verify(_build)
    (failed,) = (check for check in report.checks if not check.passed)
    assert failed.name == "gradients of old parameters, eval mode"
    assert failed.detail == "linears.0.weight"


def test_the_report_names_what_failed_with_value_bound_and_place() -> None:
    check = Check(name="outputs", value=0.5, bound=1e-6, detail="output['logits']")
    report = VerifyReport(model="Toy", checks=(check,), sites=())
    with pytest.raises(
        VerificationError, match=r"Toy: outputs: 5\.0e-01 > 1e-06 \(output\['logits"
    ):
        report.raise_if_failed()
