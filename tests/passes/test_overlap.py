"""`overlap_collectives_pass`: what moves behind the start of a collective, and what does not."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.collectives import is_collective, waits_of_starts
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.overlap import Overlap, overlap_collectives_pass
from mhc_compile.passes.schedule import is_barrier, peak_bytes

ATEN = torch.ops.aten
C10D = torch.ops._c10d_functional
OPS = torch.ops.mhc


pytestmark = pytest.mark.usefixtures("fake_ranks")


def lowered(function: Callable[..., Any], *args: Any, mode: str = "fake") -> GraphModule:
    return make_fx(function, tracing_mode=mode)(*args)


def reduced(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def run(gm: GraphModule, **options: Any) -> bool:
    modified = overlap_collectives_pass(gm, (), **options).modified
    gm.graph.lint()
    gm.recompile()
    return modified


def names(gm: GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def inside(gm: GraphModule) -> list[list[str]]:
    """What stands between the start and the wait of every collective."""
    nodes = list(gm.graph.nodes)
    return [
        [op_name(node) for node in nodes[nodes.index(start) + 1 : nodes.index(waits[0])]]
        for start, waits in waits_of_starts(gm.graph).items()
    ]


def branch(x: Tensor, w: Tensor) -> Tensor:
    """A branch with a collective at its end, and work beside it."""
    return reduced(x @ w) * 2 + x.exp()


def test_work_that_a_collective_does_not_need_runs_while_it_is_pending() -> None:
    args = torch.randn(3, 3), torch.randn(3, 3)
    gm = lowered(branch, *args)
    expected = gm(*args)
    assert inside(gm) == [[]]
    assert run(gm)
    assert inside(gm) == [["exp"]]
    assert torch.equal(gm(*args), expected)


def test_work_before_a_collective_moves_behind_it_too() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        beside = x.exp()
        return reduced(x @ w) + beside

    gm = lowered(function, torch.randn(3, 3), torch.randn(3, 3))
    assert run(gm)
    assert names(gm) == ["mm", "_c10d_functional.all_reduce", "exp",
                         "_c10d_functional.wait_tensor", "add"]  # fmt: skip


def test_what_the_next_collective_is_made_of_comes_before_other_work() -> None:
    def function(x: Tensor) -> Tensor:
        first = reduced(x.sin())
        other = x.exp()
        second = reduced(x.cos())
        return first + other + second

    gm = lowered(function, torch.randn(3))
    assert run(gm)
    assert inside(gm) == [["cos", "_c10d_functional.all_reduce", "exp"], ["exp",
                          "_c10d_functional.wait_tensor", "add"]]  # fmt: skip


def test_a_graph_without_collectives_is_left_alone() -> None:
    gm = lowered(lambda x: x.exp() + x.sin(), torch.randn(3))
    code = gm.code
    assert not run(gm)
    assert gm.code == code


def test_a_collective_with_nothing_beside_it_is_left_alone() -> None:
    gm = lowered(lambda x: reduced(x.exp()) * 2, torch.randn(3))
    assert not run(gm)


def test_nothing_moves_across_a_node_that_writes() -> None:
    def function(x: Tensor, w: Tensor, seen: Tensor) -> Tensor:
        y = reduced(x @ w)
        seen.copy_(y)
        return y + x.exp()

    args = torch.randn(3, 3), torch.randn(3, 3), torch.zeros(3, 3)
    gm = lowered(function, *args)
    assert op_name(next(filter(is_barrier, gm.graph.nodes))) == "copy"
    assert not run(gm)


def test_random_numbers_are_drawn_in_the_order_of_the_program() -> None:
    def function(x: Tensor) -> Tensor:
        noise = torch.rand_like(x)  # beside the collective, while the next one feeds it
        return reduced(torch.rand_like(x) * x) + noise

    x = torch.randn(64)
    gm = lowered(function, x)
    torch.manual_seed(0)
    expected = gm(x)
    run(gm)
    torch.manual_seed(0)
    assert torch.equal(gm(x), expected)


def test_a_second_run_changes_nothing_even_where_memory_is_short() -> None:
    for growth in (0.0, 0.1, 10.0):
        gm = lowered(sites, *site_arguments())
        assert run(gm, growth=growth)
        code = gm.code
        assert not run(gm, growth=growth)
        assert gm.code == code


def test_nodes_keep_their_names_and_their_metadata() -> None:
    gm = lowered(branch, torch.randn(3, 3), torch.randn(3, 3))
    before = {node.name: (id(node), dict(node.meta)) for node in gm.graph.nodes}
    assert run(gm)
    assert {node.name: (id(node), dict(node.meta)) for node in gm.graph.nodes} == before


def test_dynamic_sizes_get_no_guard() -> None:
    args = torch.randn(3, 3), torch.randn(3, 3)
    gm = lowered(branch, *args, mode="symbolic")
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = list(shape_env.guards)
    assert run(gm)
    assert shape_env.guards == guards
    wider = torch.randn(5, 5), torch.randn(5, 5)
    assert torch.equal(gm(*wider), branch(*wider))


def test_a_collective_on_several_tensors_ends_its_window_at_the_first_wait() -> None:
    def function(x: Tensor) -> Tensor:
        first, second = funcol.all_reduce_coalesced([x, x + 1], "sum", dist.group.WORLD)
        return first * second + x.exp()

    gm = lowered(function, torch.randn(3))
    assert run(gm, growth=1.0)
    assert inside(gm) == [["getitem", "getitem", "exp"]]


def test_the_report_tells_nodes_seconds_and_memory_before_and_after() -> None:
    found: list[Overlap] = []
    gm = lowered(branch, torch.randn(3, 3), torch.randn(3, 3))
    peak = peak_bytes(gm.graph.nodes)
    assert run(gm, report=found.append)
    (window,) = found[0].windows
    assert window.start == "all_reduce"
    assert window.nodes == (0, 1)
    assert window.seconds[0] == 0 < window.seconds[1] < window.transfer
    assert found[0].peak == (peak, peak_bytes(gm.graph.nodes))
    assert not run(gm, report=found.append)
    assert len(found) == 1


def test_peak_bytes_counts_results_until_their_last_reader_and_views_with_what_they_show() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp().view(2, 5)  # 40 bytes
        z = y.sin() + y  # 40 and 40
        return z.sum()

    assert peak_bytes(lowered(function, torch.randn(10)).graph.nodes) == 120


def test_a_limit_on_memory_keeps_work_out_of_the_window() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        total = reduced(x @ w).repeat(50, 1).exp().sum()
        return x.repeat(50, 1) * total  # early, it lives while the other big values do

    args = torch.randn(8, 8), torch.randn(8, 8)
    free, tight = lowered(function, *args), lowered(function, *args)
    before = peak_bytes(free.graph.nodes)
    assert run(free, growth=1.0)
    run(tight, growth=0.0)
    assert (inside(free), inside(tight)) == ([["repeat"]], [[]])
    assert peak_bytes(tight.graph.nodes) <= before < peak_bytes(free.graph.nodes)


SPEC = SiteSpec(streams=2, kernels="reference").encode()


def sites(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, w: Tensor) -> Tensor:
    """Two sites whose branches end in an all-reduce, the post-mix in plain operations."""
    state = OPS.expand(x, 2, -1)
    for _ in range(2):
        u, h_post, h_res, _ = OPS.pre(state, phi, bias, alpha, SPEC)
        carried = h_res @ state
        state = carried + h_post[..., None] * reduced((u @ w).tanh())[..., None, :]
    return state


def site_arguments() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (
        torch.randn(3, 4),
        torch.randn(8, 8),
        torch.randn(8),
        torch.ones(3),
        torch.randn(4, 4),
    )


def test_a_backward_graph_fills_its_windows_too() -> None:
    class Reduce(torch.autograd.Function):
        """What a row-parallel layer does to the gradient of its input."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return reduced(grad)

    def step(x: Tensor, w: Tensor, v: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, w, v)]
        hidden = torch.relu(leaves[0] @ leaves[1])
        out = Reduce.apply(hidden) @ leaves[2]
        return torch.autograd.grad(out.square().sum(), leaves)

    args = torch.randn(5, 6), torch.randn(6, 7), torch.randn(7, 3)
    gm = lowered(step, *args)
    expected = gm(*args)
    assert run(gm)
    assert "mm" in inside(gm)[0]  # the gradient of v
    assert all(map(torch.equal, gm(*args), expected))


# --- any graph ---------------------------------------------------------------------------------

CHOICES = ("sin", "add", "mm", "reduce", "gather", "coalesced", "view", "random", "write")


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Operations on values made before, by number."""
    length = draw(st.integers(2, 25))
    return [
        (draw(st.sampled_from(CHOICES)), draw(st.integers(0, i)), draw(st.integers(0, i)))
        for i in range(length)
    ]


def built(program: list[tuple[str, int, int]]) -> Callable[[Tensor], Any]:
    def function(x: Tensor) -> Any:
        values = [x]
        for kind, i, j in program:
            a, b = values[i], values[j]
            if kind == "sin":
                made = a.sin()
            elif kind == "add":
                made = a + b
            elif kind == "mm":
                made = a @ b
            elif kind == "reduce":
                made = reduced(a)
            elif kind == "gather":
                made = funcol.all_gather_single(a, 0, dist.group.WORLD)[:3]
            elif kind == "coalesced":
                made = operator.add(*funcol.all_reduce_coalesced([a, b], "sum", dist.group.WORLD))
            elif kind == "view":
                made = a.t()
            elif kind == "random":
                made = torch.rand_like(a)
            else:
                made = a.clone()
                made.mul_(b)
            values.append(made)
        return values

    return function


def ordered(gm: GraphModule, kind: Callable[[Node], bool]) -> list[Node]:
    return [node for node in gm.graph.nodes if kind(node)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(program=programs(), growth=st.sampled_from([0.0, 0.1, 100.0]))
def test_any_graph_keeps_its_bits_its_collectives_in_order_and_its_writes_in_place(
    program: list[tuple[str, int, int]], growth: float
) -> None:
    x = torch.randn(3, 3)
    gm = lowered(built(program), x)
    torch.manual_seed(0)
    expected = gm(x)
    before = {kind: ordered(gm, kind) for kind in (is_collective, is_barrier)}
    across = {node: set(list(gm.graph.nodes)[:i]) for i, node in enumerate(gm.graph.nodes)}
    peak = peak_bytes(gm.graph.nodes)
    run(gm, growth=growth)
    assert {kind: ordered(gm, kind) for kind in before} == before
    after = {node: set(list(gm.graph.nodes)[:i]) for i, node in enumerate(gm.graph.nodes)}
    for node in before[is_barrier]:
        assert after[node] == across[node]
    torch.manual_seed(0)
    assert all(map(torch.equal, gm(x), expected))
    code = gm.code
    assert not run(gm, growth=growth)
    assert gm.code == code
    assert peak_bytes(gm.graph.nodes) <= peak * (1 + growth)
