"""``torch.compile(model, backend="mhc")`` alone converts on the first call, and says so."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ConfigError, MHCConfig, MHCWarning, UnsupportedGraphError
from tests.nets import (
    WIDTH,
    Block,
    Net,
    assert_same,
    compile_blocks_,
    compiled,
    example,
    perturb_,
    run,
)


def test_the_first_call_warns_once_and_names_the_explicit_way() -> None:
    model, x = Net(), example()
    expected = run(model, model, x)
    step = compiled(model)
    with pytest.warns(MHCWarning, match=r"Net was converted to 4 residual streams") as caught:
        found = run(step, model, x)
    assert len(caught) == 1
    assert "4 sites in 1 trunks" in str(caught[0].message)
    assert "mhc_compile.convert_(model, ...)" in str(caught[0].message)
    assert_same(found, expected, output=2e-6, grad=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        step(x)
        step(example(3, 7))
        model.eval()
        step(x)


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
@pytest.mark.parametrize("config", [{}, {"streams": 2, "constraint": "none"}], ids=str)
def test_lazy_and_explicit_conversion_give_the_same_network(config: dict[str, object]) -> None:
    lazy, x = Net(), example()
    explicit = copy.deepcopy(lazy)
    mhc_compile.convert_(explicit, x, config=MHCConfig(**config))
    step = compiled(lazy, **config)
    step(x)
    mine, theirs = (dict(mhc_compile.mhc_parameters(model)) for model in (lazy, explicit))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    perturb_(lazy)
    perturb_(explicit)
    assert_same(run(step, lazy, x), run(compiled(explicit, **config), explicit, x))


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_convert_after_a_first_call_changes_nothing_or_names_the_contradiction() -> None:
    model, x = Net(), example()
    compiled(model)(x)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = mhc_compile.convert_(model, x, config=MHCConfig(inner="eager"))
    assert len(report.converted) == 4
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match="converted already"):
        mhc_compile.convert_(model, x, config=MHCConfig(streams=2))


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_a_single_block_is_a_model_of_its_own() -> None:
    block, x = Block(), example()
    expected = block(x)
    compile_blocks_([block])
    torch.testing.assert_close(block(x), expected, rtol=0, atol=2e-6)
    assert len(list(mhc_compile.mhc_parameters(block))) == 6


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_blocks_compiled_one_by_one_are_refused_and_converted_back() -> None:
    model, x = Net(), example()
    compile_blocks_(model.blocks)
    with pytest.raises(UnsupportedGraphError, match=r"convert_\(model, \.\.\.\) on the whole"):
        model(x)
    assert list(mhc_compile.mhc_parameters(model)) == []
    assert all(type(block) is Block for block in model.blocks)


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_a_learned_collapse_gets_its_head_on_the_last_site() -> None:
    model, x = Net(), example()
    expected = model(x)
    output = compiled(model, collapse="learned")(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    heads = [name for name, _ in mhc_compile.mhc_parameters(model) if "head_" in name]
    assert {name.rpartition(".")[0] for name in heads} == {"blocks.1.mhc.add1"}


def test_a_model_without_residuals_is_compiled_in_silence() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), example()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert list(mhc_compile.mhc_parameters(model)) == []


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_excluded_sites_stay_plain() -> None:
    model, x = Net(), example()
    compiled(model, exclude=("blocks.0.*",))(x)
    names = {name.split(".mhc")[0] for name, _ in mhc_compile.mhc_parameters(model)}
    assert names == {"blocks.1"}


def test_an_excluded_everything_converts_nothing_and_says_nothing() -> None:
    model, x = Net(), example()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        output = compiled(model, exclude=("*",))(x)
    torch.testing.assert_close(output, model(x))
    assert list(mhc_compile.mhc_parameters(model)) == []


def test_a_plain_function_without_modules_is_compiled_as_it_is() -> None:
    weight, x = torch.randn(WIDTH, WIDTH), example()

    def residual(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ weight)

    step = torch.compile(residual, backend="mhc", options={"inner": "eager"})
    torch.testing.assert_close(step(x), residual(x))
