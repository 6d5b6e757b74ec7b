"""What a converted model keeps for its backward, and what it computes there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mhc_compile
from mhc_compile import backend
from mhc_compile.pipeline import improving_passes
from tests.nets import WIDTH, Net, converted, example, run, saved_shapes

BLOCKS, STREAMS = 6, 4  # 12 sites


def step(model: nn.Module, recompute: int | str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "recompute": recompute}
    return run(torch.compile(model, backend="mhc", options=options), model, x)


def states_kept(model: nn.Module, recompute: int | str, x: Tensor) -> int:
    """How many n-stream states are saved for the backward."""
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "recompute": recompute}
    compiled = torch.compile(model, backend="mhc", options=options)
    return saved_shapes(lambda: compiled(x))[*x.shape[:-1], STREAMS, WIDTH]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted(Net(BLOCKS), example())


@pytest.mark.parametrize(("recompute", "states"), [("off", 12), (1, 11), (2, 5), (4, 2), (12, 0)])
def test_one_state_is_kept_where_a_block_starts(
    model: nn.Module, recompute: int | str, states: int
) -> None:
    # The first block starts from the plain input, which is replicated again.
    assert states_kept(model, recompute, example()) == states


def test_gradients_are_bitwise_the_same_whatever_is_kept(model: nn.Module) -> None:
    x = example()
    plain_output, plain = step(model, "off", x)
    for recompute in (1, "auto", BLOCKS * 2):
        output, gradients = step(model, recompute, x)
        assert torch.equal(output, plain_output)
        assert gradients.keys() == plain.keys()
        assert all(torch.equal(gradients[name], plain[name]) for name in plain)


def test_no_branch_runs_twice(model: nn.Module) -> None:
    def flops(recompute: int | str) -> dict[Any, int]:
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "recompute": recompute}
        output = torch.compile(model, backend="mhc", options=options)(example())
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        return dict(backward.get_flop_counts()["Global"])

    without = flops("off")
    # Two products a layer, each with the gradients of its input and its weight.
    assert without[torch.ops.aten.mm] > 0
    assert flops("auto") == without


def test_a_budget_given_to_torch_leaves_the_choice_to_torch(model: nn.Module) -> None:
    with torch._functorch.config.patch(activation_memory_budget=0.99):  # noqa: TID251 - the user's
        automatic, off = (states_kept(model, setting, example()) for setting in ("auto", "off"))
    assert automatic == off
    assert states_kept(model, "auto", example()) != automatic


def test_inference_has_no_blocks_that_keep_seams_apart(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = []

    def watched(*args: Any, recompute: Any, **others: Any) -> list[Any]:
        settings.append(recompute)
        return improving_passes(*args, recompute=recompute, **others)

    monkeypatch.setattr(backend, "improving_passes", watched)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        torch._dynamo.reset()
        with mode():
            torch.compile(model, backend="mhc", options={"inner": "eager"})(example())
    assert settings == ["off", "off", "auto"]


def test_what_conversion_was_told_holds_unless_compilation_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def watched(skip: Any, *, recompute: Any, **others: Any) -> list[Any]:
        seen.append((skip, recompute))
        return improving_passes(skip, recompute=recompute, **others)

    monkeypatch.setattr(backend, "improving_passes", watched)
    x, model = example(), Net()
    config = mhc_compile.MHCConfig(inner="aot_eager", recompute=1, skip_passes=("join_seams_pass",))
    mhc_compile.convert_(model, x, config=config)
    for options in ({}, {"recompute": "off"}):
        torch._dynamo.reset()
        torch.compile(model, backend="mhc", options=options)(x)
    assert seen == [(("join_seams_pass",), 1), (("join_seams_pass",), "off")]


def test_other_settings_are_refused() -> None:
    for setting in (0, -1, True, "on", 1.5):
        with pytest.raises(mhc_compile.ConfigError, match=r"recompute=.*'auto', 'off' or"):
            mhc_compile.MHCConfig(recompute=setting)  # type: ignore[arg-type]
