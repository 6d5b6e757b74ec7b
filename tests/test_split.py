"""A rewritten model cut into the stages of a pipeline."""

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

import mhc_compile
from mhc_compile import ConfigError, MHCConfig, UnsupportedGraphError
from mhc_compile.distributed import Cut, split_stages
from mhc_compile.passes.states import COLLAPSE, EXPAND, SEAM
from mhc_compile.targets import build_target
from tests.nets import (
    WIDTH,
    Block,
    Net,
    assert_same,
    converted,
    distance,
    example,
    run,
    saved_shapes,
)


def ops(module: Any, target: object) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


def through(stages: Any, x: torch.Tensor) -> torch.Tensor:
    return reduce(lambda value, stage: stage(value), stages, x)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_stages_one_after_the_other_are_the_rewritten_model(number: int) -> None:
    x = example()
    model = converted(Net(4), x)
    whole = mhc_compile.rewrite(model, x)
    split = split_stages(model, x, stages=number)
    expected, gradients = run(whole, model, x)
    found = run(lambda value: through(split.stages, value), model, x)
    assert len(split.stages) == number
    assert torch.equal(found[0], expected)
    assert_same(found, (expected, gradients))


def test_every_parameter_is_in_one_stage_under_its_name() -> None:
    x = example()
    model = converted(Net(4), x)
    split = split_stages(model, x, stages=3)
    found = [pair for stage in split.stages for pair in stage.named_parameters()]
    assert len(found) == len(dict(found))
    assert {name: id(p) for name, p in found} == {n: id(p) for n, p in model.named_parameters()}
    new = [name for stage in split.stages for name, _ in mhc_compile.mhc_parameters(stage)]
    assert set(new) == {name for name, _ in mhc_compile.mhc_parameters(model)}


def test_stages_have_equal_numbers_of_sites_and_cuts_say_what_they_send() -> None:
    x = example()
    split = split_stages(converted(Net(4), x, streams=3), x, stages=4)
    narrow = 4 * WIDTH
    assert split.cuts == tuple(
        Cut(site=f"blocks.{layer}.add1", streams_bytes=3 * narrow, collapsed_bytes=narrow)
        for layer in range(3)
    )
    assert split.bytes_per_token == 3 * 3 * narrow
    assert len(split.possible) == 8


def test_cuts_can_be_named_also_within_a_block() -> None:
    x = example()
    model = converted(Net(2), x)
    split = split_stages(model, x, stages=["blocks.0.add0"])
    assert [cut.site for cut in split.cuts] == ["blocks.0.add0"]
    assert torch.equal(through(split.stages, x), mhc_compile.rewrite(model, x)(x))
    assert "blocks.0.mhc.add0.bias" in split.stages[0].state_dict()
    assert "blocks.0.mhc.add1.bias" in split.stages[1].state_dict()


def test_a_collapsed_edge_keeps_the_function_at_conversion_and_sends_one_stream() -> None:
    x = example()
    model = Net(4)
    expected = model(x)
    split = split_stages(model, x, stages=3, boundary="collapsed")
    assert distance(through(split.stages, x), expected) <= 2e-6
    assert split.stages[0](x).shape == x.shape
    assert split.bytes_per_token == 2 * 4 * WIDTH
    assert [ops(stage, EXPAND) for stage in split.stages] == [1, 1, 1]
    assert [ops(stage, COLLAPSE) for stage in split.stages] == [1, 1, 1]


def test_a_collapsed_edge_is_another_network_once_streams_differ() -> None:
    x = example()
    model = converted(Net(4), x)
    split = split_stages(model, x, stages=3, boundary="collapsed")
    assert distance(through(split.stages, x), mhc_compile.rewrite(model, x)(x)) > 1e-3


def test_arguments_go_to_the_first_stage_and_results_come_from_the_last() -> None:
    class Structured(Net):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            y = super().forward(x * scale)
            return {"y": y, "norm": y.norm()}

    x, scale = example(), torch.tensor(2.0)
    model = Structured(2)
    mhc_compile.convert_(model, x, scale=scale)
    split = split_stages(model, x, stages=2, scale=scale)
    found = split.stages[1](split.stages[0](x, scale=scale))
    expected = mhc_compile.rewrite(model, x, scale=scale)(x, scale=scale)
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["norm"], expected["norm"])


def test_a_stage_is_compiled_with_recompute_blocks_of_its_own() -> None:
    x = example()
    split = split_stages(converted(Net(8), x), x, stages=2)
    second = split.stages[1]
    state = split.stages[0](x).detach().requires_grad_()
    kept = {}
    for recompute in ("off", 2):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "recompute": recompute}
        call = torch.compile(second, backend="mhc", options=options)
        kept[recompute] = saved_shapes(lambda call=call: call(state))[state.shape]
    # Eight sites: without blocks each keeps its state, with blocks of two the first of each does;
    # the state that arrives belongs to the caller, and is kept either way.
    assert kept == {"off": 8, 2: 4}


@pytest.mark.parametrize("skip", [(), ("join_seams_pass",)])
def test_seams_are_joined_when_a_stage_is_compiled_unless_they_are_skipped(
    skip: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_DUMP", str(tmp_path))
    x = example()
    config = MHCConfig(skip_passes=skip, inner="eager")
    split = split_stages(Net(4), x, stages=2, config=config)
    assert [ops(stage, SEAM) for stage in split.stages] == [0, 0]
    torch.compile(split.stages[0], backend="mhc")(x)
    seams = "".join(path.read_text() for path in tmp_path.rglob("*after*.txt")).count("mhc.seam")
    assert (seams > 0) == (not skip)


def test_an_add_that_was_left_stays_left_when_a_stage_is_compiled() -> None:
    x = example()
    model = converted(Net(4), x, exclude=("blocks.1.add1",))
    split = split_stages(model, x, stages=["blocks.0.add1"])
    expected = through(split.stages, x)
    for stage in split.stages:
        stage.compile(backend="mhc", options={"inner": "eager"})
    assert distance(through(split.stages, x), expected) <= 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 0}, "stages=0 is not allowed"),
        ({"stages": ["blocks.7.add0"]}, "cannot be cut behind 'blocks.7.add0', but behind blocks"),
        ({"stages": 2, "boundary": "sum"}, "boundary='sum' is not allowed"),
    ],
)
def test_what_is_not_allowed_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_stages(Net(2), example(), **options)


def test_more_stages_than_cuts_are_refused_with_what_crosses() -> None:
    class InputAgain(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.sigmoid(x)

    with pytest.raises(UnsupportedGraphError, match=r"behind 0 of them.*also alive: 'sigmoid'"):
        split_stages(InputAgain(2), example(), stages=2)


def test_a_parameter_of_two_stages_is_refused() -> None:
    block = Block()
    tied = Net([block, Block(), block])
    with pytest.raises(UnsupportedGraphError, match=r"stages 0 and 1 both read .*Untie it"):
        split_stages(tied, example(), stages=2)


def test_a_buffer_that_two_stages_update_is_refused() -> None:
    class Counting(Block):
        def __init__(self, counter: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("counter", counter)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.counter.add_(1)
            return super().forward(x)

    def net(*counters: torch.Tensor) -> Net:
        return Net([Counting(counter) for counter in counters])

    x, shared = example(), torch.zeros(())
    with pytest.raises(UnsupportedGraphError, match=r"stage 0 writes 'add_' .* stage 1 reads it"):
        split_stages(net(shared, shared), x, stages=2)
    split = split_stages(net(torch.zeros(()), torch.zeros(())), x, stages=2)
    through(split.stages, x)
    assert [dict(stage.named_buffers()) for stage in split.stages] == [
        {f"blocks.{number}.counter": 1} for number in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["hf:llama", "hf:vit"])
def test_a_model_of_transformers_is_cut_in_its_middle(target: str) -> None:
    model, args, kwargs = build_target(target, {"num_hidden_layers": 4})
    model.eval()
    split = split_stages(model, *args, stages=2, **kwargs)
    assert len(split.possible) == 8
    assert split.cuts[0].site.endswith("layers.1.add1")
    found = split.stages[1](split.stages[0](*args, **kwargs))
    expected = mhc_compile.rewrite(model, *args, **kwargs)(*args, **kwargs)
    assert torch.equal(found.logits, expected.logits)
