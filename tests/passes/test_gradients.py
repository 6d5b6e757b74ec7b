"""`accumulate_gradients_pass`: what it takes in, what it leaves, and that numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.gradients import accumulate_gradients_pass
from mhc_compile.passes.opnames import op_name

OPS = torch.ops.mhc
SPEC = SiteSpec(streams=2, iters=3, kernels="reference").encode()


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """A state, phi, bias, alpha, and the weight of the branch."""
    torch.manual_seed(0)
    made = torch.randn(3, 2, 4), torch.randn(8, 8), torch.randn(8), torch.ones(3), torch.randn(4, 4)
    return tuple(t.to(dtype) for t in made)


def site(state: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, w: Tensor) -> Tensor:
    u, h_post, h_res, _ = OPS.pre(state, phi, bias, alpha, SPEC)
    return OPS.post(state, (u @ w).tanh(), h_post, h_res, SPEC)


def step(
    *args: Tensor, read: Callable[[Tensor], Tensor] | None = None, sites: int = 1
) -> list[Tensor]:
    """Forward and backward through some sites; ``read`` looks at the first state besides."""
    leaves = [t.detach().requires_grad_() for t in args]
    state = leaves[0].sin()
    loss = state.new_zeros(()) if read is None else read(state).sum()
    for _ in range(sites):
        state = site(state, *leaves[1:])
    return list(torch.autograd.grad(loss + state.square().sum(), leaves))


def lowered(*args: Tensor, mode: str = "fake", **options: Any) -> GraphModule:
    return make_fx(lambda *given: step(*given, **options), tracing_mode=mode)(*args)


def run(gm: GraphModule) -> bool:
    modified = accumulate_gradients_pass(gm, ()).modified
    gm.graph.lint()
    gm.recompile()
    return modified


def names(gm: GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def taken_in(gm: GraphModule) -> list[bool]:
    calls = gm.graph.find_nodes(op="call_function", target=OPS.pre_backward.default)
    return [len(call.args) == 10 for call in calls]


def test_a_single_pass_takes_it_in_beside_its_gates() -> None:
    spec = SiteSpec(streams=2, iters=3, kernels="reference", single_pass=True).encode()

    def step(X: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (X, *parameters)]
        state, gates = leaves[0].sin(), leaves[0].sum(-1).repeat(1, 2)
        u, h_post, h_res, _ = OPS.pre(state, *leaves[1:4], spec, gates)
        end = OPS.post(state, (u @ leaves[4]).tanh(), h_post, h_res, spec)
        return list(torch.autograd.grad(OPS.read(end, h_post, spec).square().sum(), leaves))

    args = arguments()
    gm = make_fx(step, tracing_mode="fake")(*args)
    (call,) = gm.graph.find_nodes(op="call_function", target=OPS.pre_backward.default)
    expected, gates = gm(*args), call.args[10]
    assert call.args[9] is None
    assert run(gm)
    assert isinstance(call.args[9], Node)
    assert call.args[10] is gates
    torch.testing.assert_close(gm(*args), expected, rtol=1e-12, atol=1e-12)
    assert not run(gm)


@pytest.mark.parametrize("sites", [1, 3])
def test_the_gradient_through_post_is_added_inside(sites: int) -> None:
    args = arguments()
    gm = lowered(*args, sites=sites)
    expected, before = gm(*args), names(gm).count("add")
    assert run(gm)
    assert taken_in(gm) == [True] * sites
    assert names(gm).count("add") == before - sites
    torch.testing.assert_close(gm(*args), expected, rtol=1e-12, atol=1e-12)


def test_a_second_run_changes_nothing() -> None:
    gm = lowered(*arguments(), sites=2)
    assert run(gm)
    text = gm.code
    assert not run(gm)
    assert gm.code == text


def test_one_of_several_other_readers_is_taken_in() -> None:
    args = arguments()
    gm = lowered(*args, read=lambda state: state.exp())
    expected = gm(*args)
    assert run(gm)
    assert taken_in(gm) == [True]
    torch.testing.assert_close(gm(*args), expected, rtol=1e-12, atol=1e-12)


def test_what_is_computed_later_moves_in_front() -> None:
    def later(state: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, other: Tensor) -> Any:
        u, h_post, h_res, saved = OPS.pre(state, phi, bias, alpha, SPEC)
        grads = OPS.pre_backward(u, h_post, h_res, state, phi, bias, alpha, saved, SPEC)
        scaled = grads[1] * 2  # a reader of another result, which has to follow
        return grads[0] + other.exp(), scaled

    args = (*arguments()[:4], arguments()[0])
    gm = make_fx(later, tracing_mode="fake")(*args)
    expected = gm(*args)
    assert run(gm)
    assert taken_in(gm) == [True]
    order = names(gm)
    assert order.index("exp") < order.index("mhc.pre_backward")
    torch.testing.assert_close(gm(*args), expected, rtol=1e-12, atol=1e-12)


def _plain(state: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Any:
    u, h_post, h_res, saved = OPS.pre(state, phi, bias, alpha, SPEC)
    return OPS.pre_backward(u, h_post, h_res, state, phi, bias, alpha, saved, SPEC)


LEFT: dict[str, Callable[..., Any]] = {
    "what comes out of the same op": lambda *a: (g := _plain(*a))[0] + g[1].sum() * a[0],
    "a gradient that is read twice": lambda *a: ((g := _plain(*a))[0] + a[0], g[0].sin()),
    "a scaled addition": lambda *a: torch.add(_plain(*a)[0], a[0], alpha=2),
    "a broadcast": lambda *a: _plain(*a)[0] + a[0][:1],
    "a number": lambda *a: _plain(*a)[0] + 1.0,
    "another dtype": lambda *a: _plain(*a)[0] + a[0].float(),
    "itself": lambda *a: (g := _plain(*a)[0]) + g,
}


@pytest.mark.parametrize("name", list(LEFT))
def test_left_alone_is(name: str) -> None:
    args = arguments()[:4]
    gm = make_fx(LEFT[name], tracing_mode="fake")(*args)
    assert not run(gm)


def test_of_two_that_are_added_to_each_other_one_takes_the_other_in() -> None:
    args = arguments()[:4]
    gm = make_fx(lambda *a: _plain(*a)[0] + _plain(*a)[0], tracing_mode="fake")(*args)
    expected = gm(*args)
    assert run(gm)
    assert sorted(taken_in(gm)) == [False, True]
    torch.testing.assert_close(gm(*args), expected, rtol=1e-12, atol=1e-12)


def test_nothing_moves_across_a_write() -> None:
    def written(state: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, other: Tensor) -> Any:
        grads = _plain(state, phi, bias, alpha)
        other.mul_(2)
        return grads[0] + other.exp()

    args = (*arguments()[:4], arguments()[0])
    gm = make_fx(written, tracing_mode="fake")(*args)
    assert not run(gm)


def test_dynamic_sizes_get_no_guard() -> None:
    args = arguments()
    gm = lowered(*args, mode="symbolic")
    assert run(gm)
    assert taken_in(gm) == [True]
