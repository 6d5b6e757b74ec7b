"""Each measurement finds the fault it is there for, and nothing where there is none."""

import math

import pytest
import torch
from torch import fx, nn

from mhc_compile.checks import (
    check_differences,
    check_stochastic,
    compare_gradients,
    compare_outputs,
    disable_dropout,
    float_outputs,
    in_float64,
    perturb,
    projected,
)
from mhc_compile.errors import VerificationError
from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.stability import measure
from tests.mhc_graphs import WIDTH, rewritten_network


def _moved_network(spec: SiteSpec) -> tuple[fx.GraphModule, list[str]]:
    module = rewritten_network(spec)
    new = [name for name, _ in module.named_parameters() if ".mhc." in name]
    perturb(module, new)
    return module, new


def test_outputs_are_compared_relative_to_their_size() -> None:
    check = compare_outputs(
        "o", {"a": torch.tensor([100.0, 1.0])}, {"a": torch.tensor([100.0, 1.1])}
    )
    assert check.value == pytest.approx(1e-3, rel=1e-4)
    assert not check.passed
    assert check.detail == "a"


def test_the_worst_of_several_outputs_is_named() -> None:
    ones = torch.ones(3)
    check = compare_outputs("o", {"a": ones, "b": ones}, {"a": ones, "b": 1.5 * ones})
    assert (check.detail, check.value) == ("b", 0.5)


def test_a_nan_does_not_pass_and_is_the_worst() -> None:
    ones, nan = torch.ones(2), torch.full((2,), math.nan)
    check = compare_outputs("o", {"a": ones, "b": ones}, {"a": nan, "b": 2 * ones})
    assert check.detail == "a"
    assert not check.passed


def test_an_output_that_only_one_side_has_does_not_pass() -> None:
    check = compare_outputs("o", {"a": torch.ones(2)}, {})
    assert not check.passed
    assert check.detail == "only one has a"


def test_a_gradient_of_pure_rounding_is_no_failure_but_a_lost_one_is() -> None:
    expected = {"weight": torch.ones(2), "key.bias": torch.full((2,), 1e-9)}
    noise = {"weight": torch.ones(2), "key.bias": torch.full((2,), -1e-9)}
    assert compare_gradients("g", expected, noise).passed
    lost = {"weight": torch.zeros(2), "key.bias": torch.full((2,), 1e-9)}
    assert compare_gradients("g", expected, lost).value == pytest.approx(1.0)


def test_a_bound_grows_with_the_noise_of_float32_itself_and_no_further() -> None:
    exact = {"a": torch.ones(1, dtype=torch.float64)}
    noisy, wrong = {"a": torch.tensor([1.001])}, {"a": torch.tensor([1.01])}
    assert compare_outputs("o", noisy, {"a": torch.tensor([0.999])}, exact).passed
    assert not compare_outputs("o", noisy, wrong, exact).passed
    assert not compare_outputs("o", noisy, {"a": torch.tensor([0.999])}).passed


def test_float_outputs_are_found_in_nested_results() -> None:
    result = {"logits": torch.ones(2), "ids": torch.arange(2), "hidden": (torch.zeros(1), None)}
    assert list(float_outputs(result)) == ["output['logits']", "output['hidden'][0]"]


def test_a_result_without_float_tensors_is_refused() -> None:
    with pytest.raises(VerificationError, match="without a float tensor"):
        float_outputs({"ids": torch.arange(2)})


def test_projection_sees_what_a_plain_sum_would_cancel() -> None:
    assert abs(float(projected({"a": torch.tensor([1.0, -1.0])}))) > 0.1


@pytest.mark.parametrize("constraint", sorted(CONSTRAINTS))
def test_gradients_of_the_ops_agree_with_differences(constraint: str) -> None:
    module, new = _moved_network(SiteSpec(streams=4, constraint=constraint))
    checks = check_differences(module, new, (torch.randn(2, 3, WIDTH),), {})
    assert [check.name.split()[-1] for check in checks] == ["alpha", "bias", "phi"]
    assert [check for check in checks if not check.passed] == []


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 0.999


def _wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _HalfGradient.apply(x)  # type: ignore[no-untyped-call]
    return result


def test_a_gradient_wrong_by_a_thousandth_is_found() -> None:
    module, new = _moved_network(SiteSpec(streams=4))
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        (value,) = output.args[0]
        output.args = ((module.graph.call_function(_wrong_gradient, (value,)),),)
    module.recompile()
    checks = check_differences(module, new, (torch.randn(2, 3, WIDTH),), {})
    assert all(check.value == pytest.approx(1e-3, rel=1e-2) for check in checks)
    assert not any(check.passed for check in checks)


def test_differences_leave_the_module_as_it_was() -> None:
    module, new = _moved_network(SiteSpec(streams=2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    check_differences(module, new, (torch.randn(2, 3, WIDTH),), {})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.dtype == torch.float32 for value in module.state_dict().values())


def test_float64_reaches_past_the_models_own_casts() -> None:
    module = rewritten_network(SiteSpec(streams=2))
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    targets = [node.kwargs.get("dtype") for node in in_float64(module).graph.nodes]
    assert torch.float32 not in targets
    assert in_float64(module)(x)[0].dtype == torch.float64
    assert torch.float32 in [node.kwargs.get("dtype") for node in module.graph.nodes]


@pytest.mark.parametrize(
    "constraint", sorted(name for name, kind in CONSTRAINTS.items() if kind.doubly_stochastic)
)
def test_doubly_stochastic_constraints_stay_so_when_moved(constraint: str) -> None:
    module, _ = _moved_network(SiteSpec(streams=4, constraint=constraint))
    sites = measure(module, torch.randn(2, 3, WIDTH)).sites
    assert all(check.passed for check in check_stochastic(sites))
    assert min(site.mixing.smallest for site in sites) >= 0


def test_too_few_sinkhorn_steps_leave_columns_that_do_not_sum_to_one() -> None:
    module, _ = _moved_network(SiteSpec(streams=4, iters=1))
    rows, columns = check_stochastic(measure(module, torch.randn(2, 3, WIDTH)).sites)
    assert rows.passed
    assert not columns.passed


@pytest.mark.parametrize("constraint", ["none", "orthogonal"])
def test_signed_constraints_say_that_they_are_not_doubly_stochastic(constraint: str) -> None:
    assert not CONSTRAINTS[constraint].doubly_stochastic
    module, _ = _moved_network(SiteSpec(streams=4, constraint=constraint))
    checks = check_stochastic(measure(module, torch.randn(2, 3, WIDTH)).sites)
    assert not all(check.passed for check in checks)


def test_dropout_is_off_wherever_its_probability_is_kept() -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {})()
            self.config.attention_dropout, self.config.hidden_size = 0.1, 8
            self.drop_prob = 0.2
            self.inner = nn.Sequential(nn.Dropout(0.5), nn.MultiheadAttention(8, 2, dropout=0.3))

    model = Configured().train()
    disable_dropout(model)
    assert (model.config.attention_dropout, model.config.hidden_size) == (0.0, 8)
    assert model.drop_prob == 0.0
    x = torch.randn(3, 8)
    assert torch.equal(model.inner[0](x), x)
    assert torch.equal(model.inner[1](x, x, x)[0], model.inner[1](x, x, x)[0])
