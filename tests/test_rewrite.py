"""The stand-alone rewritten module of torch.export."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import mhc_compile
from mhc_compile import MHCConfig, UnsupportedGraphError
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


def test_a_plain_model_is_left_as_it_is_and_the_result_has_parameters_of_its_own() -> None:
    model, x = Net(), example()
    keys = list(model.state_dict())
    expected = model(x)
    module = mhc_compile.rewrite(model, x)
    assert distance(module(x), expected) <= 2e-6
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    new = set(module.state_dict()) - set(keys)
    mhc_compile.convert_(model, x)
    assert new == {name for name, _ in mhc_compile.mhc_parameters(model)}


def test_a_converted_model_lends_its_parameters() -> None:
    x = example()
    model = converted(Net(), x)
    module = mhc_compile.rewrite(model, x)
    mine, theirs = dict(module.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    perturb_(model, 0.5)
    assert_same(run(module, model, x), run(compiled(model), model, x))


def test_state_dicts_go_both_ways() -> None:
    x = example()
    model = converted(Net(), x)
    fresh = mhc_compile.rewrite(Net(), x)
    fresh.load_state_dict(model.state_dict())
    assert distance(fresh(x), compiled(model)(x)) <= 1e-6


def test_any_backend_and_eager_run_it() -> None:
    x = example()
    model = converted(Net(), x)
    module = mhc_compile.rewrite(model, x)
    expected = module(x)
    assert distance(torch.compile(module, backend="aot_eager")(x), expected) <= 1e-6


@pytest.mark.parametrize(
    ("skip", "sites"),
    [((), ["pre", *["seam"] * 3, "post"]), (("join_seams_pass",), ["pre", "post"] * 4)],
)
def test_it_holds_mhc_ops_and_no_marker(skip: tuple[str, ...], sites: list[str]) -> None:
    x = example()
    model = converted(Net(), x)
    module = mhc_compile.rewrite(model, x, config=MHCConfig(skip_passes=skip))
    ops = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    expected = [f"mhc.{name}.default" for name in ("expand", *sites, "collapse")]
    assert [op for op in ops if "mhc" in op] == expected


def test_passes_that_the_conversion_left_out_stay_out() -> None:
    x, model = example(), Net()
    mhc_compile.convert_(model, x, config=MHCConfig(skip_passes=("join_seams_pass",)))
    ops = [str(node.target) for node in mhc_compile.rewrite(model, x).graph.nodes]
    assert ops.count("mhc.post.default") == 4
    assert "mhc.seam.default" not in ops


def test_dynamic_shapes_stay_dynamic() -> None:
    model = converted(Net(), example())
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    module = mhc_compile.rewrite(model, example(2, 5), dynamic_shapes=shapes)
    for shape in ((2, 5), (3, 7), (6, 2)):
        x = example(*shape)
        assert distance(module(x), compiled(model)(x)) <= 1e-6


def test_a_residual_in_a_plain_function_is_found_under_its_caller() -> None:
    def residual(x: torch.Tensor, branch: nn.Module) -> torch.Tensor:
        return x + torch.tanh(branch(x))

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return residual(residual(x, self.a), self.b)

    x = example()
    model = converted(Net([Calls()]), x)
    assert distance(mhc_compile.rewrite(model, x)(x), compiled(model)(x)) <= 1e-6


def test_a_block_registered_twice_shares_its_parameters() -> None:
    first, x = Block(), example()
    model = converted(Net([first, Block(), first]), x)
    module = mhc_compile.rewrite(model, x)
    assert_same(run(module, model, x), run(compiled(model), model, x))


def test_keyword_and_nested_inputs_pass_through() -> None:
    class Nested(Net):
        def forward(self, pair: tuple[torch.Tensor, int], *, bias: Any) -> dict[str, torch.Tensor]:
            return {"out": super().forward(pair[0] * pair[1] + bias["b"])}

    x, bias = example(), {"b": torch.randn(WIDTH)}
    model = Nested()
    expected = model((x, 2), bias=bias)["out"]
    module = mhc_compile.rewrite(model, (x, 2), bias=bias)
    assert distance(module((x, 2), bias=bias)["out"], expected) <= 2e-6


def test_the_configuration_is_that_of_the_call() -> None:
    model, x = Net(), example()
    module = mhc_compile.rewrite(model, x, config=MHCConfig(streams=2, exclude=("blocks.0.*",)))
    new = {name for name in module.state_dict() if ".mhc." in name}
    assert {name.split(".mhc")[0] for name in new} == {"blocks.1"}
    assert module.state_dict()["blocks.1.mhc.add0.bias"].numel() == 2 * 2 + 4


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason() -> None:
    class Depends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x if x.sum() > 0 else x

    with pytest.raises(UnsupportedGraphError, match=r"torch.export cannot trace Depends: .+"):
        mhc_compile.rewrite(Depends(), example())


def test_train_and_eval_mode_are_baked_in() -> None:
    class Drops(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    x = example()
    model = converted(Drops(), x)
    training = mhc_compile.rewrite(model.train(), x)
    evaluation = mhc_compile.rewrite(model.eval(), x)
    assert distance(training(x), training(x)) > 0
    assert torch.equal(evaluation(x), evaluation(x))


def test_a_rewritten_module_can_be_copied() -> None:
    x = example()
    module = mhc_compile.rewrite(converted(Net(), x), x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
