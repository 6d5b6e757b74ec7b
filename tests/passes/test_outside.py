"""What a graph break hides from a graph, and somebody else knows of it."""

import operator

import pytest
import torch

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.plan import plan_trunks
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.sums import sum_trees
from mhc_compile.passes.vocabulary import BENDS, MIXES
from tests.passes.graphs import Builder
from tests.passes.residual_graphs import SHAPE, ffn


def two_inputs(finish=lambda b, h: h, swapped=False):
    """``x + finish(h)``; ``h`` was computed from ``x`` before, or (``swapped``) comes first."""
    b = Builder()
    first, second = b.input(*SHAPE), b.input(*SHAPE)
    x, h = (second, first) if swapped else (first, second)
    root = b.call(operator.add, x, finish(b, h))
    return b.output(root), x, h, root


def says(x, h, kind):
    """An answer to questions: ``h`` comes from ``x``, with ``kind`` on the way."""
    return lambda tree, number, later, earlier: kind if (later, earlier) == (h, x) else None


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_of_two_inputs_is_a_site_if_one_was_computed_from_the_other(swapped):
    graph, x, h, root = two_inputs(swapped=swapped)
    assert find_residuals(graph).sites == ()
    (site,) = find_residuals(graph, says(x, h, MIXES)).sites
    assert (site.root, site.skip, site.origin, site.branches) == (root, x, x, (h,))
    assert site.crosses
    assert "graph break" in site.traits


def test_what_mixes_may_lie_on_either_side_of_the_break():
    graph, x, h, _ = two_inputs(lambda b, h: b.linear(h))
    (site,) = find_residuals(graph, says(x, h, 0)).sites
    assert site.crosses


def test_an_elementwise_function_of_the_skip_makes_no_site_across_a_break_either():
    graph, x, h, _ = two_inputs(lambda b, h: b.call(torch.relu, h))
    (entry,) = find_residuals(graph, says(x, h, BENDS)).rejected
    assert entry.clause == "mixing"


def test_a_branch_that_others_read_is_none_across_a_break_either():
    b = Builder()
    x, h = b.input(*SHAPE), b.input(*SHAPE)
    graph = b.output(b.call(operator.add, x, h), b.linear(h))
    (entry,) = find_residuals(graph, says(x, h, MIXES)).rejected
    assert entry.clause == "branch"


def test_nobody_is_asked_about_a_sum_that_is_a_site_by_itself():
    b = Builder()
    x, y = b.input(*SHAPE), b.input(*SHAPE)
    graph = b.output(b.call(operator.add, x, ffn(b, b.call(operator.mul, x, y))))

    def ask(*question):
        raise AssertionError(question)

    (site,) = find_residuals(graph, ask).sites
    assert not site.crosses


def test_parameters_are_not_asked_about():
    b = Builder()
    x, weight = b.input(*SHAPE), b.parameter(*SHAPE)
    asked = []
    find_residuals(
        b.output(b.call(operator.add, x, weight)), lambda *question: asked.append(question)
    )
    assert asked == []


def test_two_inputs_cannot_come_from_each_other():
    b = Builder()
    x, y = b.input(*SHAPE), b.input(*SHAPE)
    graph = b.output(b.call(operator.add, x, y))
    (site,) = find_residuals(graph, lambda *question: MIXES).sites
    assert site.skip is x


def test_order_of_the_inputs_does_not_matter_to_the_index():
    graph, x, h, root = two_inputs(swapped=True)
    index = FlowIndex(graph, {h: {x: MIXES}})
    assert index.position[x] < index.position[h]
    assert index.depends(root, x)
    assert index.readers(x) == 2
    assert [tree.root for tree in sum_trees(index.nodes)] == [root]


def test_the_branch_of_such_a_site_holds_nothing_of_its_graph():
    graph, x, h, _ = two_inputs(lambda b, h: b.linear(h))
    plan = plan_trunks(graph, find_residuals(graph, says(x, h, MIXES)), {})
    (planned,) = plan.sites
    assert planned.branch == frozenset()
    assert planned.start is x
    assert plan.arrivals[0].value is x


def test_of_two_outputs_that_show_the_end_of_a_trunk_the_sum_itself_carries_it_on():
    b = Builder()
    x = b.input(*SHAPE)
    root = b.call(operator.add, x, ffn(b, x))
    normed = b.call(torch.nn.functional.layer_norm, root, (4,))
    graph = b.output(normed, root)
    (departure,) = plan_trunks(graph, find_residuals(graph), {}).departures
    assert (departure.value, departure.position) == (root, 1)


def test_a_site_may_be_told_to_start_streams_of_its_own():
    b = Builder()
    x = b.input(*SHAPE)
    y = b.call(torch.nn.functional.layer_norm, b.call(operator.add, x, ffn(b, x)), (4,))
    graph = b.output(b.call(operator.add, y, ffn(b, y)))
    residuals = find_residuals(graph)
    assert [len(trunk) for trunk in plan_trunks(graph, residuals, {}).trunks] == [2]
    plan = plan_trunks(graph, residuals, {}, starting={0, 1})
    assert [len(trunk) for trunk in plan.trunks] == [1, 1]
    assert not plan.left


def test_a_site_that_starts_where_streams_pass_is_left_with_the_reason():
    b = Builder()
    x = b.input(*SHAPE)
    y = b.call(operator.add, x, ffn(b, x))
    graph = b.output(b.call(operator.add, y, ffn(b, y)))
    plan = plan_trunks(graph, find_residuals(graph), {}, starting={0, 1})
    assert list(plan.left) == [1]
    assert "starts streams of its own" in plan.left[1]
