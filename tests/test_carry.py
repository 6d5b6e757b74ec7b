"""The n streams pass from graph to graph, or the call is refused: they never start over."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mhc_compile import UnsupportedGraphError, carry
from tests.nets import (
    WIDTH,
    Net,
    assert_same,
    compile_blocks_,
    compiled,
    converted,
    distance,
    example,
    run,
)


class Between(Net):
    """Does something to the trunk between two blocks that are compiled one by one."""

    between: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number == 1 and self.between is not None:
                x = self.between(x)
            x = block(x)
        return self.head(x)


class Reverse(torch.autograd.Function):
    """The same values, and minus the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


LOSSES = {
    "detach": lambda x: x.detach(),
    "in place": lambda x: x.mul_(1.5),
    "new tensor": lambda x: x + 0.0,
    "cast": lambda x: x.double().float(),
    "view": lambda x: x.view(-1, WIDTH),
    "gradient reversal": Reverse.apply,
}


@pytest.mark.parametrize("what", LOSSES)
def test_what_loses_the_streams_between_blocks_is_refused_by_name(what: str) -> None:
    x = example()
    model = converted(Between(), x)
    compile_blocks_(model.blocks)
    run(model, model, x)
    model.between = LOSSES[what]
    with pytest.raises(UnsupportedGraphError, match=r"streams were lost before add0 \(nets.py:\d+"):
        model(x)


def test_an_alias_of_the_trunk_keeps_the_streams() -> None:
    x = example()
    model = converted(Between(), x)
    expected = run(compiled(model), model, x)
    compile_blocks_(model.blocks)
    model.between = torch.ops.aten.alias.default
    assert_same(run(model, model, x), expected)
    with torch.no_grad():
        assert distance(model(x), expected[0]) <= 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_streams_pass_without_gradients(mode: Callable[[], Any]) -> None:
    x = example()
    model = converted(Net(3), x)
    with mode():
        expected = compiled(model)(x)
        compile_blocks_(model.blocks)
        assert distance(model(x), expected) <= 1e-6


def visible_and_state() -> tuple[torch.Tensor, torch.Tensor]:
    """A trunk value with a gradient path, and streams that travel with it."""
    leaf = torch.randn(2, WIDTH, requires_grad=True)
    state = (leaf * 2).unsqueeze(-2).expand(2, 4, WIDTH)
    visible = state.mean(-2)
    carry.put(visible, (state,), -1)
    return visible, state


def test_a_state_arrives_with_its_tensor_and_a_zero_gradient_for_it() -> None:
    visible, state = visible_and_state()
    (found,) = carry.get(visible, -1)
    assert torch.equal(found, state)
    gradient, zero = torch.autograd.grad(found.sum(), (state, visible))
    assert torch.equal(gradient, torch.ones_like(state))
    assert torch.equal(zero, torch.zeros_like(visible))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.detach(),
        lambda t: t.view(-1),
        lambda t: t[:1],
        lambda t: t.clone(),
        lambda t: t.transpose(0, 1),
        Reverse.apply,
    ],
)
def test_a_state_does_not_arrive_with_another_tensor(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    visible, _ = visible_and_state()
    assert carry.get(change(visible), -1) is None


def test_a_state_does_not_arrive_after_a_write_or_on_another_axis() -> None:
    visible, _ = visible_and_state()
    assert carry.get(visible, -2) is None
    with torch.no_grad():
        visible.mul_(2)
        assert carry.get(visible, -1) is None


def test_streams_are_freed_after_backward() -> None:
    x = example()
    model = converted(Net(3), x)
    compile_blocks_(model.blocks, "aot_eager")
    run(model, model, x)
    alive = watch_states(model)
    gc.disable()
    try:
        model(x).sum().backward()
        assert len(alive) == 2
        assert [state() for state in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("training", [True, False])
def test_streams_are_freed_with_a_forward_that_is_not_followed_by_a_backward(
    training: bool,
) -> None:
    x = example()
    model = converted(Net(3), x)
    compile_blocks_(model.blocks, "aot_eager")
    with torch.set_grad_enabled(training):
        model(x)
        alive = watch_states(model)
        output = model(x)
        assert len(alive) == 2
        del output
        gc.collect()
        assert [state() for state in alive] == [None, None]


def watch_states(model: Net) -> list[weakref.ref[torch.Tensor]]:
    """Weak references to each state that leaves a block from now on."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        cell = getattr(output.untyped_storage(), "_mhc", None)
        if cell is not None:
            alive.extend(map(weakref.ref, cell.state))

    for block in model.blocks:
        block.register_forward_hook(torch.compiler.disable(watch))
    return alive


def test_a_state_passes_to_two_readers() -> None:
    class Fork(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            trunk = self.blocks[0](self.stem(x))
            return self.head(self.blocks[1](trunk) * self.blocks[2](trunk))

    x = example()
    model = Fork(3)
    expected = run(model, model, x)
    converted(model, x, perturbed=False)
    compile_blocks_(model.blocks)
    assert_same(run(model, model, x), expected, output=2e-6, grad=1e-5)
