import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.plan import Plan
from mhc_compile.passes.widen import Widening
from mhc_compile.pipeline import (
    OPTIONAL_PASSES,
    canonical_passes,
    improving_passes,
    joint_passes,
    lowered_passes,
    rewrite_passes,
    run_passes,
)


def graph_module():
    graph = Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    return GraphModule(nn.Module(), graph)


def replace_neg(gm, example_inputs):
    for node in gm.graph.nodes:
        if node.target is torch.neg:
            node.target = torch.abs
            return PassResult(gm, True)
    return PassResult(gm, False)


def test_the_passes_and_their_order_are_these():
    assert [name for name, _ in canonical_passes("auto", [])] == [
        "canonicalize_pass",
        "rewrite_chains_pass",
    ]
    assert [name for name, _ in rewrite_passes(Widening(Plan(), {}))] == ["widen_trunks_pass"]
    assert [name for name, _ in improving_passes()] == ["join_seams_pass"]
    names = [name for name, _ in improving_passes(recompute="auto")]
    assert names == ["tag_recompute_pass", "join_seams_pass"]
    names = [name for name, _ in improving_passes(recompute="auto", seam_norm=True)]
    assert names == ["tag_recompute_pass", "join_seams_pass", "join_norms_pass"]
    assert [name for name, _ in joint_passes()] == ["keep_mappings_pass"]
    first = ["replay_sites_pass", "accumulate_gradients_pass"]
    assert [name for name, _ in lowered_passes()] == first
    names = [name for name, _ in lowered_passes(overlap="auto")]
    assert names == [
        *first,
        "split_sites_pass",
        "overlap_collectives_pass",
    ]
    names = [name for name, _ in lowered_passes(overlap="auto", side_stream=True)]
    assert names[4:] == ["assign_streams_pass", "lower_streams_pass"]


def test_passes_that_only_improve_can_be_left_out_by_name():
    assert improving_passes(OPTIONAL_PASSES, seam_norm=True) == []
    assert joint_passes(OPTIONAL_PASSES) == []
    assert lowered_passes(OPTIONAL_PASSES, overlap="auto", side_stream=True) == []


def test_every_pass_takes_graph_and_inputs_and_leaves_a_plain_graph_alone():
    passes = [
        *canonical_passes("auto", []),
        *rewrite_passes(Widening(Plan(), {})),
        *improving_passes(seam_norm=True),
        *lowered_passes(overlap="auto", side_stream=True),
    ]
    for _, function in passes:
        gm = graph_module()
        assert function(gm, ()) == PassResult(gm, False)


def test_the_runner_recompiles_and_shows_only_what_changed():
    gm, seen = graph_module(), []
    passes = [("first", replace_neg), ("second", replace_neg)]
    assert run_passes(gm, (), passes, lambda name, shown: seen.append((name, shown))) == ["first"]
    assert seen == [("first", gm)]
    assert gm(torch.tensor(-1.0)) == 1.0
    assert not run_passes(gm, (), passes, lambda name, shown: seen.append((name, shown)))
    assert len(seen) == 1


def test_the_runner_passes_the_inputs_on():
    inputs = []

    def look(gm, example_inputs):
        inputs.append(example_inputs)
        return PassResult(gm, False)

    example = (torch.ones(1),)
    assert not run_passes(graph_module(), example, [("look", look)])
    assert inputs == [example]


def test_a_pass_that_breaks_the_graph_is_stopped():
    def unsort(gm, example_inputs):
        x, neg, _ = gm.graph.nodes
        neg.append(x)
        return PassResult(gm, True)

    with pytest.raises(RuntimeError, match="before it has been defined"):
        run_passes(graph_module(), (), [("unsort", unsort)])
