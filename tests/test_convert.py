"""What convert_, revert_ and explain do to a model, and what they leave alone."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ConfigError, MHCConfig, UnsupportedGraphError
from mhc_compile import convert as convert_module
from tests.nets import (
    WIDTH,
    Block,
    Net,
    assert_same,
    compiled,
    converted,
    distance,
    example,
    perturb_,
    run,
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that conversion must be able to give back."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "children": [list(module._modules) for module in model.modules()],
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values = before.pop("values"), after.pop("values")
    assert after == before
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


class ConvBlock(nn.Module):
    """A residual block with batch norm: buffers that every run in train mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + nn.functional.dropout(self.norm(self.conv(x)), 0.1, self.training))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_changes_no_output_and_no_gradient(inner: str, training: bool) -> None:
    model, x = Net(3).train(training), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == [
        f"blocks.{block}.add{add}" for block in range(3) for add in range(2)
    ]
    assert {site.trunk for site in report.sites} == {0}
    assert_same(run(compiled(model, inner), model, x), expected, output=2e-6, grad=1e-5)


def test_state_dict_of_the_plain_model_still_loads() -> None:
    model, other, x = Net(), Net(), example()
    mhc_compile.convert_(model, x)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert set(missing) == {name for name, _ in mhc_compile.mhc_parameters(model)}
    assert all(".mhc.add" in name for name in missing)
    assert distance(compiled(model)(x), other(x)) <= 2e-6


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_state_dict(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = Net()
    mhc_compile.convert_(fresh, example())
    fresh.load_state_dict(torch.load(buffer))
    return fresh


@pytest.mark.parametrize("through", [by_deepcopy, by_pickle, by_torch_save, by_state_dict])
def test_a_saved_and_loaded_model_computes_the_same(
    through: Callable[[nn.Module], nn.Module],
) -> None:
    x = example()
    model = converted(Net(), x)
    loaded = through(model)
    with pytest.raises(mhc_compile.NotCompiledError):
        loaded(x)
    expected = run(compiled(model), model, x)
    found = run(compiled(loaded), loaded, x)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()


def test_a_deepcopy_is_independent_and_can_be_reverted_alone() -> None:
    x = example()
    model = converted(Net(), x)
    expected = compiled(model)(x)
    twin = copy.deepcopy(model)
    perturb_(twin, 1.0)
    assert distance(compiled(twin)(x), expected) > 1e-3
    mhc_compile.revert_(twin)
    assert torch.equal(compiled(model)(x), expected)


def test_converting_twice_changes_nothing() -> None:
    model, x = Net(), example()
    first = mhc_compile.convert_(model, x)
    perturb_(model)
    before = snapshot(model)
    second = mhc_compile.convert_(model, x)
    assert_untouched(model, before)
    assert second.sites == first.sites
    assert second.trunks == first.trunks


def test_another_configuration_is_refused_and_names_the_way_out() -> None:
    model, x = Net(), example()
    mhc_compile.convert_(model, x)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"with streams=4 and not streams=2: .*revert_\(model\)"):
        mhc_compile.convert_(model, x, config=MHCConfig(streams=2))
    assert_untouched(model, before)


def test_revert_restores_classes_keys_and_outputs_bit_for_bit() -> None:
    model, x = Net(), example()
    before, expected = snapshot(model), model(x)
    mhc_compile.convert_(model, x)
    perturb_(model)
    mhc_compile.revert_(model)
    assert_untouched(model, before)
    assert torch.equal(model(x), expected)
    assert list(mhc_compile.mhc_parameters(model)) == []


def test_revert_of_a_plain_model_does_nothing() -> None:
    model = Net()
    before = snapshot(model)
    mhc_compile.revert_(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("function", [mhc_compile.explain, mhc_compile.convert_])
def test_buffers_and_random_state_are_as_before(function: Callable[..., Any]) -> None:
    model, x = Net([ConvBlock(), ConvBlock()]), torch.randn(2, WIDTH, WIDTH)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    report = function(model, x)
    assert len(report.converted) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert len(buffers) == 6
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_explain_reports_a_converted_model_as_converted_with_its_own_configuration() -> None:
    model, x = Net(), example()
    mhc_compile.convert_(model, x, config=MHCConfig(streams=2, exclude=("*.add1",)))
    report = mhc_compile.explain(model, x)
    assert report.config["streams"] == 2
    assert {site.status for site in report.sites if site.key == "add0"} == {"converted"}
    assert {site.status for site in report.sites if site.key == "add1"} == {"left"}


def test_explain_changes_nothing_and_reports_what_conversion_does() -> None:
    model, x = Net(), example()
    before = snapshot(model)
    found = mhc_compile.explain(model, x)
    assert_untouched(model, before)
    done = mhc_compile.convert_(model, x)
    assert {site.status for site in found.sites} == {"found"}
    assert {site.status for site in done.sites} == {"converted"}
    assert [site.name for site in found.sites] == [site.name for site in done.sites]
    assert found.trunks == done.trunks


def test_a_failure_while_attaching_leaves_the_model_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Net(3), example()
    before, calls = snapshot(model), []
    attach = convert_module.check_calls_

    def fails_at_the_third(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no more")
        attach(*args)

    monkeypatch.setattr(convert_module, "check_calls_", fails_at_the_third)
    with pytest.raises(MemoryError):
        mhc_compile.convert_(model, x)
    assert len(calls) == 3
    assert_untouched(model, before)


def test_what_a_forward_keeps_on_its_module_is_put_back() -> None:
    class Counts(Block):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = x
            return super().forward(x)

    model, x = Net([Counts()]), example()
    before = snapshot(model)
    assert len(mhc_compile.explain(model, x).sites) == 2
    assert_untouched(model, before)
    assert model.blocks[0].calls == 0


def test_a_failing_forward_leaves_the_model_bit_for_bit_and_shows_its_own_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            raise KeyError("of the user")

    model, x = Net([ConvBlock(), Fails()]), torch.randn(2, WIDTH, WIDTH)
    before = snapshot(model)
    with pytest.raises(KeyError, match="of the user"):
        mhc_compile.convert_(model, x)
    assert_untouched(model, before)


def test_inputs_that_do_not_fit_are_an_error_with_the_line_of_the_user() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(
        UnsupportedGraphError, match=r"Net cannot be traced .* at \w+\.py:\d+: .*First"
    ):
        mhc_compile.convert_(model, torch.randn(2, 3, WIDTH + 1))
    assert_untouched(model, before)


@pytest.mark.parametrize("call", [mhc_compile.explain, mhc_compile.convert_])
def test_a_function_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedGraphError, match=r"a function is no torch\.nn\.Module"):
        call(lambda x: x + torch.tanh(x), example())


def test_an_owner_with_its_own_mhc_attribute_is_refused_untouched() -> None:
    model, x = Net(), example()
    model.blocks[1].mhc = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(UnsupportedGraphError, match="Block has an attribute 'mhc' of its own"):
        mhc_compile.convert_(model, x)
    assert_untouched(model, before)


def test_a_model_without_residual_adds_gets_a_report_and_nothing_else() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), example()
    before = snapshot(model)
    report = mhc_compile.convert_(model, x)
    assert report.sites == ()
    assert list(mhc_compile.mhc_parameters(model)) == []
    assert torch.equal(compiled(copy.deepcopy(model))(x), model(x))
    mhc_compile.revert_(model)
    assert_untouched(model, before)


def test_a_model_of_integers_is_left_alone() -> None:
    class Integers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x @ x)

    model, x = Integers(), torch.ones(3, 3, dtype=torch.int64)
    report = mhc_compile.convert_(model, x)
    assert report.sites == ()
    assert torch.equal(compiled(model)(x), model(x))


def test_a_trunk_that_is_written_in_place_under_an_alias_is_left_with_the_reason() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alias = x.view(-1)
            x += torch.tanh(self.linear(x.clone()))
            return x * alias.sum()

    model, x = Aliased(), example()
    expected = model(x.clone())
    report = mhc_compile.convert_(model, x.clone())
    (site,) = report.left
    assert "in place" in site.reason
    assert "visible under another name" in site.reason
    assert site.source.startswith("test_convert.py:")
    assert distance(compiled(model)(x.clone()), expected) <= 2e-6


def test_one_stream_is_the_plain_residual() -> None:
    model, x = Net(), example()
    before = snapshot(model)
    report = mhc_compile.convert_(model, x, config=MHCConfig(streams=1))
    assert {site.reason for site in report.left} == {"streams=1 is the plain residual"}
    assert list(mhc_compile.mhc_parameters(model)) == []
    assert torch.equal(compiled(copy.deepcopy(model))(x), model(x))
    mhc_compile.revert_(model)
    assert_untouched(model, before)


def test_a_block_used_twice_shares_its_parameters() -> None:
    first, second, x = Block(), Block(), example()
    model = Net([first, second, first])
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert len(report.sites) == 6
    assert len(list(mhc_compile.mhc_parameters(model))) == 2 * 2 * 3
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_the_module_around_a_sequential_subclass_keeps_its_sites() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    branches = [Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    model, x = Net(branches), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == ["add0", "add1"]
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_a_residual_in_a_plain_function_belongs_to_the_module_that_calls_it() -> None:
    def residual(x: torch.Tensor, branch: nn.Module) -> torch.Tensor:
        return x + branch(x)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(residual(torch.relu(residual(x, self.a)), self.b))

    model, x = Net([Calls()]), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == ["blocks.0.add0", "blocks.0.add1"]
    assert len({site.source for site in report.sites}) == 1
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_a_layer_of_torch_itself_is_converted_alone_and_in_a_stack() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = example()
    for model, sites in ((layer, 2), (stack, 4)):
        expected = run(model, model, x)
        report = mhc_compile.convert_(model, x)
        assert len(report.converted) == sites
        assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conversion_under_no_grad_and_inference_mode_gives_trainable_parameters(
    mode: Callable[[], Any],
) -> None:
    model, x = Net(), example()
    expected = run(model, model, x)
    with mode():
        mhc_compile.convert_(model, x)
        assert distance(compiled(model)(x), expected[0]) <= 2e-6
    parameters = [parameter for _, parameter in mhc_compile.mhc_parameters(model)]
    assert all(p.requires_grad and not p.is_inference() for p in parameters)
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_nested_and_keyword_inputs_and_outputs_pass_through() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(
            self, pair: tuple[torch.Tensor, int], *, named: dict[str, torch.Tensor]
        ) -> dict[str, Any]:
            x = pair[0] * pair[1] + named["bias"]
            hidden = []
            for block in self.blocks:
                x = block(x)
                hidden.append(x)
            return {"last": x, "hidden": tuple(hidden)}

    model, pair, named = Nested(), (example(), 2), {"bias": torch.randn(WIDTH)}
    expected = model(pair, named=named)
    report = mhc_compile.convert_(model, pair, named=named)
    assert len(report.converted) == 4
    found = compiled(model)(pair, named=named)
    assert distance(found["last"], expected["last"]) <= 2e-6
    for mine, theirs in zip(found["hidden"], expected["hidden"], strict=True):
        assert distance(mine, theirs) <= 2e-6


def test_a_converted_part_of_a_larger_model_keeps_working_inside_it() -> None:
    inner, x = Net(), example()
    outer = nn.Sequential(nn.Linear(WIDTH, WIDTH), inner, Block())
    expected = run(outer, outer, x)
    converted(inner, x, perturbed=False)
    found = run(compiled(outer), outer, x)
    assert_same(found, expected, output=2e-6, grad=1e-5)
    assert all(name.startswith("1.") for name, _ in mhc_compile.mhc_parameters(outer))


def test_a_model_of_which_a_part_is_converted_is_not_taken_for_a_converted_one() -> None:
    inner, x = Net(), example()
    outer = nn.Sequential(inner, Block())
    mhc_compile.convert_(inner, x)
    before = snapshot(outer)
    with pytest.raises(UnsupportedGraphError, match=r"only a part .*revert_"):
        mhc_compile.convert_(outer, x)
    assert_untouched(outer, before)


def test_parameters_stay_float32_when_the_model_is_cast_to_half() -> None:
    model, x = Net(), example()
    mhc_compile.convert_(model, x)
    model.to(torch.bfloat16)
    assert model.stem.weight.dtype == torch.bfloat16
    assert {p.dtype for _, p in mhc_compile.mhc_parameters(model)} == {torch.float32}
    output, gradients = run(compiled(model, "aot_eager"), model, x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert gradients["blocks.0.mhc.add0.phi"].dtype == torch.float32


def test_a_model_in_bfloat16_keeps_its_function() -> None:
    model, x = Net().bfloat16(), example().bfloat16()
    expected = model(x)
    report = mhc_compile.convert_(model, x)
    assert {site.dtype for site in report.sites} == {"bfloat16"}
    assert {p.dtype for _, p in mhc_compile.mhc_parameters(model)} == {torch.float32}
    assert distance(compiled(model, "aot_eager")(x).float(), expected.float()) <= 2e-2


def test_a_model_in_float64_keeps_its_function_to_the_precision_of_its_coefficients() -> None:
    model, x = Net().double(), example().double()
    expected = run(model, model, x)
    mhc_compile.convert_(model, x)
    found = run(compiled(model, "aot_eager"), model, x)
    assert found[0].dtype == torch.float64
    assert_same(found, expected, output=2e-6, grad=1e-5)


def test_mhc_parameters_are_exactly_the_new_ones() -> None:
    model, x = Net(), example()
    old = {name for name, _ in model.named_parameters()}
    mhc_compile.convert_(model, x)
    named = dict(mhc_compile.mhc_parameters(model))
    assert named.keys() | old == {name for name, _ in model.named_parameters()}
    assert not named.keys() & old
    assert named.keys() == {
        f"blocks.{block}.mhc.add{add}.{name}"
        for block in range(2)
        for add in range(2)
        for name in ("phi", "bias", "alpha")
    }
    assert named["blocks.0.mhc.add0.phi"].shape == (4 * WIDTH, 24)
