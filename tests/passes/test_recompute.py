"""`tag_recompute_pass`: which nodes get a tag, and in which blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.recompute import block_length, tag_recompute_pass
from mhc_compile.passes.seams import join_seams_pass
from tests.passes.programs import Branch
from tests.passes.rewriting import Traced, assert_same, traced, widen

SHAPE = (2, 3, 8)


class Stack(nn.Module):
    """A trunk of ``depth`` sites, normed on the trunk if asked."""

    def __init__(self, depth: int, *, post_norm: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(depth))
        self.norm = nn.LayerNorm(8) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = self.norm(x + branch(x))
        return x


class Partly(Stack):
    """A checkpointed site between others."""

    def forward(self, x: Tensor) -> Tensor:
        def site(branch: nn.Module, x: Tensor) -> Tensor:
            return x + branch(x)

        for number, branch in enumerate(self.branches):
            own = number == 2
            x = checkpoint(site, branch, x, use_reentrant=False) if own else site(branch, x)
        return x


def widened(module: nn.Module, **options: Any) -> Traced:
    torch.manual_seed(0)
    t = traced(module, torch.randn(SHAPE), **options)
    widen(t, noise=0.1)
    return t


def tag(t: Traced, length: int | None = None) -> bool:
    modified = tag_recompute_pass(t.gm, (), length=length).modified
    t.gm.graph.lint()
    return modified


def tagged(t: Traced, name: str) -> list[int]:
    """Block of every node of this name."""
    return [n.meta["ac_graph_id"] for n in t.gm.graph.nodes if op_name(n) == name]


def is_tagged(node: Node) -> bool:
    return node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE


@pytest.mark.parametrize(
    ("sites", "length"),
    [(1, 1), (24, 4), (36, 4), (48, 6), (56, 7), (60, 6), (80, 8), (96, 8), (122, 9)],
)
def test_a_block_has_the_length_of_equation_20(sites: int, length: int) -> None:
    assert block_length(sites, 4) == length


def test_the_work_of_the_streams_is_tagged_and_no_branch() -> None:
    t = widened(Stack(3))
    assert tag(t)
    for node in t.gm.graph.nodes:
        name = op_name(node) if node.op.startswith("call") else ""
        mapping = name == "getitem" and op_name(node.args[0]) == "mhc.pre"
        assert is_tagged(node) == (name in ("mhc.expand", "mhc.pre", "mhc.post") or mapping), node


def test_blocks_of_a_given_length_follow_each_other() -> None:
    t = widened(Stack(5))
    assert tag(t, 2)
    assert tagged(t, "mhc.expand") == [0]
    assert tagged(t, "mhc.pre") == tagged(t, "mhc.post") == [0, 0, 1, 1, 2]


def test_the_length_is_that_of_equation_20_unless_given() -> None:
    t = widened(Stack(6))
    assert tag(t)
    size = block_length(6, 3)
    assert tagged(t, "mhc.pre") == [site // size for site in range(6)]


def test_operations_between_sites_belong_to_the_block_before() -> None:
    t = widened(Stack(3, post_norm=True))
    assert tag(t, 1)
    norms = [n for n in t.gm.graph.nodes if op_name(n) == "layer_norm" and is_tagged(n)]
    blocks = [node.meta["ac_graph_id"] for node in norms]
    assert blocks == [0, 1]  # the last norm acts on the collapsed value


def test_a_seam_does_not_cross_the_start_of_a_block() -> None:
    t = widened(Stack(5))
    tag(t, 2)
    join_seams_pass(t.gm, ())
    assert tagged(t, "mhc.seam") == [0, 1]
    assert tagged(t, "mhc.pre") == [0, 1, 2]


def test_regions_of_the_user_stay_and_keep_their_place_in_the_order() -> None:
    t = widened(Partly(5))
    before = {n.name: n.meta["recompute"] for n in t.gm.graph.nodes if "recompute" in n.meta}
    assert before
    assert tag(t, 1)
    assert tagged(t, "mhc.pre") == [0, 1, 2, 3, 4]
    regions = {n.meta["ac_graph_id"] for n in t.gm.graph.nodes if n.name in before}
    assert regions == {2}
    assert all(n.meta["recompute"] == before[n.name] for n in t.gm.graph.nodes if n.name in before)


def test_a_second_run_changes_nothing() -> None:
    t = widened(Stack(4))
    assert tag(t)
    before = [(n.meta.get("recompute"), n.meta.get("ac_graph_id")) for n in t.gm.graph.nodes]
    assert tag_recompute_pass(t.gm, ()) == PassResult(t.gm, False)
    after = [(n.meta.get("recompute"), n.meta.get("ac_graph_id")) for n in t.gm.graph.nodes]
    assert after == before


def test_nothing_is_computed_differently_with_symbolic_sizes() -> None:
    t = widened(Stack(3), dynamic=True)
    outputs = t.run()
    assert tag(t)
    assert_same(t.run(), outputs, 0.0)


def test_a_site_alone_has_no_state_to_drop() -> None:
    t = widened(Stack(1))
    assert not tag(t)


def test_a_graph_without_streams_is_left_alone() -> None:
    t = traced(Stack(2), torch.randn(SHAPE))
    assert not tag(t)
