"""A converted model never runs silently as the plain network."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import MHCWarning, NotCompiledError
from mhc_compile.guard import checked_class, is_checked, refusal
from tests.nets import (
    Block,
    Net,
    assert_same,
    compile_blocks_,
    compiled,
    converted,
    distance,
    example,
    run,
)

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def test_an_eager_call_raises_and_says_what_to_do() -> None:
    x = example()
    model = converted(Net(), x)
    with pytest.raises(NotCompiledError) as caught:
        model(x)
    text = str(caught.value)
    assert 'torch.compile(model, backend="mhc")' in text
    assert "mhc_compile.revert_(model)" in text
    assert 'on_eager="warn"' in text


def test_policy_warn_warns_and_computes_the_plain_network() -> None:
    model, x = Net(), example()
    expected = model(x)
    converted(model, x, on_eager="warn")
    with pytest.warns(MHCWarning, match="runs without the mhc backend"):
        assert torch.equal(model(x), expected)


def test_policy_ignore_is_silent() -> None:
    model, x = Net(), example()
    expected = model(x)
    converted(model, x, on_eager="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        assert torch.equal(model(x), expected)
        assert distance(torch.compile(model, backend="eager")(x), expected) <= 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_backend_raises(backend: str, mode: Callable[[], Any]) -> None:
    x = example()
    model = converted(Net(1), x)
    with mode(), pytest.raises(NotCompiledError, match="compiled by another backend"):
        torch.compile(model, backend=backend)(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_backend_warns_where_that_is_the_policy(backend: str) -> None:
    x = example()
    model = converted(Net(1), x, on_eager="warn")
    with pytest.warns(MHCWarning, match="compiled by another backend"):
        torch.compile(model, backend=backend)(x)


def test_an_exported_program_that_was_not_rewritten_raises() -> None:
    x = example()
    model = converted(Net(1), x)
    program = torch.export.export(model, (x,), strict=False)
    with pytest.raises(NotCompiledError):
        program.module()(x)


@pytest.mark.parametrize("per_block", [False, True])
@torch._dynamo.config.patch(recompile_limit=2)
def test_the_recompile_limit_raises(per_block: bool) -> None:
    x = example()
    model = converted(Net(), x)
    call: Callable[..., Any] = compiled(model)
    if per_block:
        compile_blocks_(model.blocks)
        call = model

    def with_four_dtypes() -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            model.to(dtype)
            call(x.to(dtype))

    with pytest.raises(NotCompiledError, match="recompile limit"):
        with_four_dtypes()


def test_a_block_that_compilation_is_disabled_for_raises() -> None:
    x = example()
    model = converted(Net(), x)
    model.blocks[1] = torch.compiler.disable(model.blocks[1])
    with pytest.raises((NotCompiledError, mhc_compile.UnsupportedGraphError)):
        compiled(model)(x)


def test_a_forward_that_compilation_is_disabled_for_raises() -> None:
    x = example()
    model = converted(Net(), x)
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)
    with pytest.raises((NotCompiledError, mhc_compile.UnsupportedGraphError)):
        compiled(model)(x)


@torch._dynamo.config.patch(suppress_errors=True)
def test_suppressed_compile_errors_still_raise() -> None:
    x = example()
    model = converted(Net(), x)
    with pytest.raises((NotCompiledError, mhc_compile.ConfigError)):
        compiled(model, streams=2)(x)


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_that_runs_eagerly_raises(stance: str) -> None:
    x = example()
    model = converted(Net(), x)
    step = compiled(model)
    with torch.compiler.set_stance(stance), pytest.raises(NotCompiledError):
        step(x)


def test_code_compiled_before_conversion_is_not_used_after_it() -> None:
    model, x = Net(), example()
    plain = torch.compile(model, backend="eager")
    expected = plain(x)
    converted(model, x, perturbed=False)
    with pytest.raises(NotCompiledError):
        plain(x)
    mhc_compile.revert_(model)
    assert distance(plain(x), expected) <= 1e-6


def test_an_eager_checkpoint_around_compiled_blocks_is_no_false_alarm() -> None:
    class Outside(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    x = example()
    model = converted(Outside(), x)
    whole = run(compiled(model, "aot_eager"), model, x)
    compile_blocks_(model.blocks, "aot_eager")
    assert_same(run(model, model, x), whole)


def test_a_checked_module_shows_the_class_and_signature_of_the_users() -> None:
    x = example()
    model = converted(Net(), x)
    block = model.blocks[0]
    assert is_checked(block)
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert type(block).__module__ == Block.__module__
    assert inspect.signature(block.forward) == inspect.signature(Block().forward)
    assert not is_checked(model)


def test_one_class_serves_a_signature() -> None:
    assert checked_class(Block, "a") is checked_class(Block, "a")
    assert checked_class(Block, "a") is not checked_class(Block, "b")


def test_a_module_that_cannot_keep_sites_says_why() -> None:
    class Meta(type):
        pass

    class Strange(nn.Module, metaclass=Meta):
        pass

    class Pickles(nn.Module):
        def __reduce_ex__(self, protocol: Any) -> Any:
            return super().__reduce_ex__(protocol)

    replaced = Block()
    replaced.forward = lambda x: x
    assert "iterates" in (refusal(nn.Sequential()) or "")
    assert "metaclass" in (refusal(Strange()) or "")
    assert "pickles itself" in (refusal(Pickles()) or "")
    assert "replaced on the instance" in (refusal(replaced) or "")
    assert "ScriptModule" in (refusal(torch.jit.script(nn.ReLU())) or "")
    assert refusal(Block()) is None


def test_a_site_that_no_module_can_keep_is_left_with_the_reason() -> None:
    block, x = Block(), example()
    forward = block.forward
    block.forward = lambda x: forward(x)
    report = mhc_compile.convert_(block, x)
    assert [site.status for site in report.sites] == ["left", "left"]
    assert {site.reason for site in report.left} == {
        "the add happens in a plain function: put it into the forward of a module"
    }
