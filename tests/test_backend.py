"""The same network however it is compiled: whole, per block, rewritten, exported, checkpointed."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mhc_compile
from mhc_compile import ConfigError
from mhc_compile.backend import mhc
from mhc_compile.kernels.constraints import CONSTRAINTS
from tests.nets import (
    WIDTH,
    Block,
    Net,
    PostNormBlock,
    assert_same,
    compile_blocks_,
    compiled,
    compiled_graphs,
    converted,
    distance,
    example,
    perturb_,
    run,
)


@pytest.fixture(autouse=True)
def _fresh_counters() -> None:
    torch._dynamo.utils.counters.clear()


def per_block(model: Net, inner: str = "eager") -> Net:
    """A copy that shares no compiled code, each block compiled on its own."""
    twin = copy.deepcopy(model)
    compile_blocks_(twin.blocks, inner)
    return twin


def test_whole_model_per_block_rewritten_and_exported_agree() -> None:
    x = example()
    model = converted(Net(3), x)
    whole = run(compiled(model), model, x)
    blocks = per_block(model)
    assert_same(run(blocks, blocks, x), whole)
    rewritten = mhc_compile.rewrite(model, x)
    assert_same(run(rewritten, model, x), whole)
    exported = torch.export.export(rewritten, (x,)).module()
    assert distance(exported(x), whole[0]) <= 1e-6
    assert distance(whole[0], Net.forward(mhc_free(model), x)) > 1e-3


def mhc_free(model: nn.Module) -> Any:
    """The plain network that ``model`` was before conversion."""
    twin = copy.deepcopy(model)
    mhc_compile.revert_(twin)
    return twin


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_lowered_graphs_agree_with_eager_ones(inner: str) -> None:
    x = example()
    model = converted(Net(), x)
    eager = run(compiled(model), model, x)
    torch.compiler.reset()
    assert_same(run(compiled(model, inner), model, x), eager)
    blocks = per_block(model, inner)
    assert_same(run(blocks, blocks, x), eager)


def test_a_second_run_gives_the_same_gradients_bit_for_bit() -> None:
    x = example()
    model = converted(Net(), x)
    step = compiled(model, "aot_eager")
    first, second = run(step, model, x), run(step, model, x)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_layers_of_one_role_share_a_graph_and_other_roles_do_not() -> None:
    x = example()
    model = converted(Net(5), x)
    torch._dynamo.utils.counters.clear()
    blocks = per_block(model)
    found = run(blocks, blocks, x)
    assert compiled_graphs() == 3  # the first block expands, the last one passes nothing on
    assert_same(found, run(compiled(model), model, x))


def test_models_of_one_class_and_other_constraints_do_not_share_a_graph() -> None:
    x = example()
    models = [Net() for _ in range(2)]
    for model, constraint in zip(models, ("sinkhorn", "sinkhorn_softmax"), strict=True):
        converted(model, x, constraint=constraint, sinkhorn_eps=0.05, sinkhorn_iters=2)
    expected = [mhc_compile.rewrite(model, x)(x) for model in models]
    torch.compiler.reset()
    for model, output in zip(models, expected, strict=True):
        assert distance(compiled(model)(x), output) <= 1e-6
    torch.compiler.reset()
    for model, output in zip(models, expected, strict=True):
        compile_blocks_(model.blocks)
        assert distance(model(x), output) <= 1e-6


def test_a_post_norm_model_per_block_equals_the_whole_graph() -> None:
    x = example()
    model = converted(Net([PostNormBlock() for _ in range(3)]), x)
    whole = run(compiled(model), model, x)
    blocks = per_block(model)
    assert_same(run(blocks, blocks, x), whole)
    assert_same(run(mhc_compile.rewrite(model, x), model, x), whole)


def test_a_model_that_ends_in_a_norm_per_block_equals_the_whole_graph() -> None:
    x = example()
    model = Net()
    model.head = nn.LayerNorm(WIDTH)
    converted(model, x)
    whole = run(compiled(model), model, x)
    blocks = per_block(model)
    assert_same(run(blocks, blocks, x), whole)
    assert_same(run(mhc_compile.rewrite(model, x), model, x), whole)


def test_a_block_that_is_called_again_agrees_per_block() -> None:
    x = example()
    first, second = Block(), Block()
    model = converted(Net([first, second, first]), x)
    whole = run(compiled(model), model, x)
    blocks = copy.deepcopy(model)
    compile_blocks_([blocks.blocks[0], blocks.blocks[1]])
    assert_same(run(blocks, blocks, x), whole)
    assert_same(run(mhc_compile.rewrite(model, x), model, x), whole)


def test_new_shapes_and_modes_need_no_new_parameters() -> None:
    model = converted(Net(), example())
    names = [name for name, _ in model.named_parameters()]
    step = compiled(model)
    for shape in ((2, 5), (3, 7), (1, 9), (4, 1)):
        x = example(*shape)
        assert distance(step(x), mhc_compile.rewrite(model, x)(x)) <= 1e-6
    with torch.no_grad():
        step(example(3, 7))
    model.eval()
    step(example(3, 7))
    assert names == [name for name, _ in model.named_parameters()]


def test_a_marked_dynamic_size_compiles_once() -> None:
    model = converted(Net(), example())
    torch._dynamo.utils.counters.clear()
    step = compiled(model, "aot_eager")
    for batch, length in ((2, 5), (3, 7), (6, 4)):
        x = example(batch, length)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert distance(step(x), mhc_compile.rewrite(model, x)(x)) <= 1e-6
    assert compiled_graphs() == 1


def test_per_block_training_with_evaluation_stays_below_the_recompile_limit() -> None:
    x = example()
    model = converted(Net(3), x)
    blocks, step = per_block(model), compiled(model)
    for shape in ((2, 5), (3, 7)):
        for training in (True, False):
            y = example(*shape)
            model.train(training), blocks.train(training)
            with torch.set_grad_enabled(training):
                assert distance(blocks(y), step(y)) <= 1e-6


def test_a_frozen_parameter_gets_no_gradient() -> None:
    x = example()
    model = converted(Net(), x)
    step = compiled(model, "aot_eager")
    everything = run(step, model, x)
    model.blocks[0].mhc.add0.phi.requires_grad_(False)
    found = run(step, model, x)
    assert everything[1].keys() - found[1].keys() == {"blocks.0.mhc.add0.phi"}
    assert torch.equal(found[0], everything[0])


def test_autocast_keeps_coefficients_in_float32() -> None:
    x = example()
    model = converted(Net(), x)
    exact = run(compiled(model, "aot_eager"), model, x)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.mhc.pre.default, torch.ops.mhc.seam.default):
                seen.append([part.dtype for part in result[-3:-1]])
            return result

    with torch.autocast("cpu", torch.bfloat16):
        found = run(compiled(model, "aot_eager"), model, x)
        rewritten = mhc_compile.rewrite(model, x)
    with torch.autocast("cpu", torch.bfloat16), Watch():
        rewritten(x)
    assert seen == [[torch.float32, torch.float32]] * 4
    assert found[1]["blocks.0.mhc.add0.phi"].dtype == torch.float32
    assert 0 < distance(found[0].float(), exact[0]) < 5e-2


def test_old_parameters_and_mhc_parameters_train_and_streams_part() -> None:
    x, target = example(4, 6), example(4, 6)
    model = converted(Net(), x, perturbed=False)
    assert mhc_compile.stability(model, x).trunks[0].spread < 1e-6
    step = compiled(model, "aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, moved = [], dict.fromkeys((n for n, _ in mhc_compile.mhc_parameters(model)), 0.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(step(x), target)
        loss.backward()
        for name, parameter in mhc_compile.mhc_parameters(model):
            assert parameter.grad is not None, name
            moved[name] = max(moved[name], float(parameter.grad.abs().max()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert min(moved.values()) > 1e-7, moved
    assert mhc_compile.stability(model, x).trunks[0].spread > 1e-3


def test_with_a_uniform_pre_mix_the_streams_stay_equal() -> None:
    x, target = example(4, 6), example(4, 6)
    model = converted(Net(), x, perturbed=False)
    with torch.no_grad():
        for _, parameter in mhc_compile.mhc_parameters(model):
            if parameter.dim() == 1 and parameter.numel() == 24:
                parameter[:4] = torch.logit(torch.tensor(0.25))
    step = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(step(x), target).backward()
        optimizer.step()
    assert mhc_compile.stability(model, x).trunks[0].spread < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        *({"constraint": name} for name in sorted(CONSTRAINTS)),
        {"dynamic": False},
        {"collapse": "learned"},
        {"collapse": "learned", "dynamic": False},
        {"streams": 2},
    ],
    ids=str,
)
def test_every_configuration_keeps_the_function_and_agrees_per_block(
    config: dict[str, Any],
) -> None:
    model, x = Net(), example()
    expected = run(model, model, x)
    converted(model, x, perturbed=False, **config)
    tolerance = 2e-5 if config.get("constraint") == "sinkhorn_softmax" else 2e-6
    assert_same(run(compiled(model), model, x), expected, output=tolerance, grad=5 * tolerance)
    perturb_(model)
    whole = run(compiled(model), model, x)
    blocks = per_block(model)
    assert_same(run(blocks, blocks, x), whole)
    assert_same(run(mhc_compile.rewrite(model, x), model, x), whole)


def test_a_sum_collapse_with_the_init_of_the_paper_multiplies_the_trunk() -> None:
    x = example()
    model = converted(Net(), x, perturbed=False, collapse="sum", init="paper")
    plain = mhc_free(model)
    trunk = x
    for layer in (plain.stem, *plain.blocks):
        trunk = layer(trunk)
    # Each block starts with a norm, so that H_pre that sums to 1.09 changes nothing.
    assert distance(compiled(model)(x), plain.head(4 * trunk)) <= 1e-5
    perturb_(model)
    blocks = per_block(model)
    assert distance(blocks(x), compiled(model)(x)) <= 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 2}, "streams=2 contradicts .* streams=4"),
        ({"constraint": "none"}, "constraint='none' contradicts .*'sinkhorn'"),
        ({"include": ("head.*",)}, "include=.* contradicts"),
        ({"stream": 4}, "unknown option stream: .*streams"),
        ({"streams": 99}, "99"),
    ],
)
def test_options_that_contradict_the_conversion_or_are_wrong_are_config_errors(
    options: dict[str, Any], message: str
) -> None:
    x = example()
    model = converted(Net(), x)
    with pytest.raises(ConfigError, match=message) as caught:
        compiled(model, **options)(x)
    assert isinstance(caught.value, ValueError)
    assert type(caught.value).__name__ == "ConfigError"


def test_a_mode_of_inductor_needs_inductor() -> None:
    with pytest.raises(ConfigError, match="mode='max-autotune' is a setting of Inductor"):
        mhc(torch.fx.symbolic_trace(nn.ReLU()), [], mode="max-autotune", options={"inner": "eager"})


@pytest.mark.slow
def test_a_mode_of_inductor_is_passed_on() -> None:
    x = example()
    model = converted(Net(1), x)
    step = torch.compile(model, backend="mhc", mode="max-autotune-no-cudagraphs")
    assert distance(step(x), mhc_compile.rewrite(model, x)(x)) <= 1e-6


def test_batch_norm_counts_once_a_step_and_sees_what_it_saw() -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.norm(self.conv(x)))

    model, x = Net([Convolutions(), Convolutions()]), torch.randn(2, WIDTH, WIDTH)
    plain = copy.deepcopy(model)
    expected = run(plain, plain, x)
    assert len(mhc_compile.convert_(model, x).converted) == 2
    assert_same(run(compiled(model, "aot_eager"), model, x), expected, output=2e-6, grad=1e-5)
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert distance(mine.float(), theirs.float()) <= 2e-6


class Checkpointed(Net):
    """The blocks run through ``torch.utils.checkpoint``."""

    context_fn: Callable[[], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = {} if self.context_fn is None else {"context_fn": self.context_fn}
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **extra)
        return self.head(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_checkpointed_model_equals_the_plain_one(inner: str) -> None:
    model, x = Checkpointed(), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == [
        f"blocks.{block}.add{add}" for block in range(2) for add in range(2)
    ]
    assert_same(run(compiled(model, inner), model, x), expected, output=2e-6, grad=1e-5)
    perturb_(model)
    plain = Net()
    mhc_compile.convert_(plain, x)
    plain.load_state_dict(model.state_dict())
    assert_same(run(compiled(model, inner), model, x), run(compiled(plain), plain, x))


def test_nested_checkpoints_are_looked_into() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, torch.relu(x), use_reentrant=False)

    model, x = Checkpointed([Outer(), Outer()]), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert len(report.converted) == 4
    assert_same(run(compiled(model, "aot_eager"), model, x), expected, output=2e-6, grad=1e-5)


def _save_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def test_a_selective_checkpoint_keeps_its_policy_and_its_plain_adds() -> None:
    model, x = Checkpointed(), example()
    Checkpointed.context_fn = staticmethod(
        functools.partial(create_selective_checkpoint_contexts, _save_nothing)
    )
    try:
        expected = run(model, model, x)
        report = mhc_compile.convert_(model, x)
        assert report.converted == ()
        found = run(compiled(model, "aot_eager"), model, x)
    finally:
        Checkpointed.context_fn = None
    assert_same(found, expected, output=2e-6, grad=1e-5)


def test_a_site_that_a_selective_checkpoint_hides_later_is_refused() -> None:
    model, x = Checkpointed(), example()
    converted(model, x)
    Checkpointed.context_fn = staticmethod(
        functools.partial(create_selective_checkpoint_contexts, _save_nothing)
    )
    try:
        with pytest.raises(mhc_compile.MHCError):
            compiled(model, "aot_eager")(x)
    finally:
        Checkpointed.context_fn = None


def test_options_that_agree_with_the_conversion_are_accepted_in_silence() -> None:
    x = example()
    model = converted(Net(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mhc_compile.MHCWarning)
        compiled(model, streams=4, constraint="sinkhorn", on_eager="raise")(x)


def test_on_eager_is_settled_by_the_conversion() -> None:
    x = example()
    model = converted(Net(), x)
    with pytest.raises(mhc_compile.ConfigError, match="on_eager='warn' contradicts"):
        compiled(model, on_eager="warn")(x)


class Sub(nn.Module):
    """The post-norm half of a BERT layer: it keeps the site, the layer around it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.dense(hidden)))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention, self.output = Sub(), Sub()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.mix(x), x)
        return self.output(torch.relu(self.wide(x)), x)


@pytest.mark.slow
# The compiled frame is the layer's own, one for all roles: three times what the plain model needs.
@torch._dynamo.config.patch(recompile_limit=16)
def test_layers_whose_parts_keep_the_sites_agree_per_layer_in_all_modes() -> None:
    x = example()
    model = Net([BertLayer() for _ in range(3)])
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.owner for site in report.converted] == [
        f"blocks.{layer}.{part}" for layer in range(3) for part in ("attention", "output")
    ]
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)
    perturb_(model)
    step, blocks = compiled(model), per_block(model)
    assert_same(run(blocks, blocks, x), run(step, model, x))
    for shape in ((2, 5), (3, 7)):
        for training in (True, False):
            y = example(*shape)
            model.train(training), blocks.train(training)
            with torch.set_grad_enabled(training):
                assert distance(blocks(y), step(y)) <= 1e-6
