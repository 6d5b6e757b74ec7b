"""`join_seams_pass`: where it fires, what it leaves alone, and that nothing else changes."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import checkpoint

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.seams import join_seams_pass
from tests.passes.programs import Branch
from tests.passes.rewriting import Traced, assert_same, exported, traced, widen

SHAPE = (2, 3, 8)


class Stack(nn.Module):
    """A trunk of ``depth`` sites."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


class Looked(Stack):
    """A trunk that is also read between its sites."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.branches[0](x)
        middle = x.relu()
        x = x + self.branches[1](x)
        return x, middle


class Checkpointed(Stack):
    """Every site in a checkpointed region of its own."""

    def forward(self, x: Tensor) -> Tensor:
        def site(branch: nn.Module, x: Tensor) -> Tensor:
            return x + branch(x)

        for branch in self.branches:
            x = checkpoint(site, branch, x, use_reentrant=False)
        return x


def join(t: Traced) -> bool:
    modified = join_seams_pass(t.gm, ()).modified
    t.gm.graph.lint()
    t.gm.recompile()
    return modified


def mhc_ops(t: Traced) -> list[str]:
    names = (op_name(node) for node in t.gm.graph.nodes if node.op == "call_function")
    return [name.removeprefix("mhc.") for name in names if name.startswith("mhc.")]


def widened(module: nn.Module, trace: Any = traced) -> Traced:
    torch.manual_seed(0)
    t = trace(module, torch.randn(SHAPE))
    widen(t, noise=0.1)
    return t


def test_neighbouring_sites_are_joined() -> None:
    t = widened(Stack())
    assert mhc_ops(t) == ["expand", "pre", "post", "pre", "post", "pre", "post", "collapse"]
    assert join(t)
    assert mhc_ops(t) == ["expand", "pre", "seam", "seam", "post", "collapse"]


@pytest.mark.parametrize("trace", [traced, exported])
@pytest.mark.parametrize("module", [Stack, Looked])
def test_outputs_and_gradients_are_bitwise_the_same(module: Any, trace: Any) -> None:
    t = widened(module(), trace)
    outputs, gradients = t.run(), t.gradients()
    assert join(t)
    assert_same(t.run(), outputs, 0.0)
    assert_same(t.gradients(), gradients, 1e-6)  # of X': summed in another order


def test_readers_between_two_sites_see_the_joined_state() -> None:
    t = widened(Looked(2))
    assert join(t)
    assert mhc_ops(t) == ["expand", "pre", "seam", "collapse", "post", "collapse"]


def test_a_second_run_changes_nothing() -> None:
    t = widened(Stack())
    assert join(t)
    before = str(t.gm.graph)
    assert join_seams_pass(t.gm, ()) == PassResult(t.gm, False)
    assert str(t.gm.graph) == before


def test_sizes_may_be_symbolic() -> None:
    torch.manual_seed(0)
    t = traced(Stack(), torch.randn(SHAPE), dynamic=True)
    widen(t, noise=0.1)
    outputs = t.run()
    assert join(t)
    assert_same(t.run(), outputs, 0.0)


def test_new_nodes_carry_the_source_and_name_of_the_site_they_leave() -> None:
    t = widened(Stack())
    (post, *_) = t.gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.post.default)
    trace, site = post.meta["stack_trace"], post.meta["custom"]
    join(t)
    (seam, *_) = t.gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.seam.default)
    assert (seam.meta["stack_trace"], seam.meta["custom"]) == (trace, site)


def test_sites_in_different_checkpointed_regions_stay_apart() -> None:
    t = widened(Checkpointed())
    posts = t.gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.post.default)
    if len({post.meta.get("ac_graph_id") for post in posts}) == 1:
        pytest.fail("the regions have no identity in the graph: this test shows nothing")
    assert not join(t)


def two_sites(
    first: SiteSpec, second: SiteSpec, cast: bool = False, late: bool = False
) -> GraphModule:
    """post, then pre, by hand; ``late`` computes the bias after another reader of the state."""
    graph = Graph()
    names = ("X", "f", "h_post", "h_res", "phi", "bias", "alpha")
    X, f, h_post, h_res, phi, bias, alpha = map(graph.placeholder, names)
    state = graph.call_function(torch.ops.mhc.post.default, (X, f, h_post, h_res, first.encode()))
    seen = graph.call_function(torch.neg, (state,))
    if late:
        bias = graph.call_function(torch.add, (bias, graph.call_method("sum", (seen,))))
    if cast:
        state = graph.call_method("to", (state, torch.float32))
    pre = graph.call_function(torch.ops.mhc.pre.default, (state, phi, bias, alpha, second.encode()))
    u = graph.call_function(operator.getitem, (pre, 0))
    graph.output((u, seen))
    return GraphModule(nn.Module(), graph)


SPEC = SiteSpec(streams=4)


def test_a_pair_by_hand_is_joined() -> None:
    assert join_seams_pass(two_sites(SPEC, SPEC), ()).modified


@pytest.mark.parametrize(
    ("first", "second", "options"),
    [
        (SPEC, SiteSpec(streams=4, iters=5), {}),
        (SPEC, SPEC, {"cast": True}),
        (SPEC, SPEC, {"late": True}),
    ],
    ids=["other specification", "something between", "parameters known too late"],
)
def test_what_does_not_fit_is_left_alone(
    first: SiteSpec, second: SiteSpec, options: dict[str, bool]
) -> None:
    gm = two_sites(first, second, **options)
    before = str(gm.graph)
    assert join_seams_pass(gm, ()) == PassResult(gm, False)
    assert str(gm.graph) == before
