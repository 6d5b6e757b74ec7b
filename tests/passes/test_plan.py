import operator

import torch
import torch.nn.functional as F
from torch import nn

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.plan import plan_trunks
from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder
from tests.passes.programs import Branch
from tests.passes.rewriting import planned, traced

SHAPE = (2, 3, 8)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.f, self.g, self.h = Branch(), Branch(), Branch()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.body = forward

    def forward(self, *args):
        return self.body(self, *args)


def plan_of(forward, *args):
    return planned(traced(Net(forward), *(args or (torch.randn(SHAPE),))))


def graph_plan(b, *outputs, refused=None):
    graph = b.output(*outputs)
    return plan_trunks(graph, find_residuals(graph), refused or {})


def ffn(b, x):
    return b.linear(b.call(torch.tanh, b.linear(x)))


# ----------------------------------------------------------------------------------- refusals


def test_a_value_that_is_written_in_place_is_refused_with_its_line():
    def forward(m, x):
        x = m.linear(x)
        y = x + m.f(x)
        y[:, 0] = 0.0
        return (y,)

    (reason,) = plan_of(forward).left.values()
    assert "(test_plan.py:" in reason
    assert reason.startswith("'setitem'")
    assert reason.endswith(
        "writes in place to a value of the trunk that is also visible under another name: "
        "write it out of place, as in x = x + f(x)"
    )


def test_a_sum_into_a_tensor_of_the_caller_is_refused():
    b = Builder()
    x = b.call(torch.neg, b.input(*SHAPE))
    out = b.input(*SHAPE)
    add = b.call(torch.add, x, ffn(b, x), out=out)
    assert "writes in place" in graph_plan(b, add).left[0]


def test_a_site_inside_a_branch_that_starts_at_the_same_value_is_refused():
    t = traced(Net(lambda m, x: (x + m.h(m.g(y := x + m.f(x)) + y),)), torch.randn(SHAPE))
    plan = plan_trunks(t.gm.graph, find_residuals(t.gm.graph), {})  # origins not parted
    assert len(plan.sites) == 2
    (reason,) = plan.left.values()
    assert reason.startswith("it lies in the branch of the site ")
    assert reason.endswith("and starts from the same value")


def test_what_the_caller_leaves_out_is_left_with_its_reason():
    plan = planned(
        traced(Net(lambda m, x: (x + m.f(x),)), torch.randn(SHAPE)), refused={0: "excluded"}
    )
    assert (plan.sites, plan.trunks, plan.left) == ([], [], {0: "excluded"})


def test_a_sum_of_complex_numbers_is_refused():
    b = Builder()
    x = b.input(2, 8, dtype=torch.complex64)
    product = b.call(torch.matmul, x, b.input(8, 8, dtype=torch.complex64))
    plan = graph_plan(b, b.call(operator.add, x, b.call(torch.tanh, product)))
    assert plan.left == {0: "its sum is torch.complex64 of rank 2: streams hold real channels"}


def test_a_width_that_varies_is_refused():
    class Mix(nn.Module):
        def forward(self, x):
            return x + torch.tanh(x @ x.mT @ x)

    x = torch.randn(2, 3, 8)
    torch._dynamo.mark_dynamic(x, 2)
    plan = planned(traced(Mix(), x, dynamic=None))
    (reason,) = plan.left.values()
    assert reason.startswith("the width of the trunk (")
    assert reason.endswith(") is not a constant")


def test_a_skip_without_a_form_for_streams_is_refused_with_the_operation():
    def forward(m, x):
        rows = x.view(-1)
        return (rows + m.f(x).view(-1),)

    (reason,) = plan_of(forward).left.values()
    assert reason == (
        "the skip has no per-stream form: view does not keep the channels as one axis"
    )


# --------------------------------------------------------------------------------------- trunks


def test_a_trunk_knows_its_steps_axis_width_and_what_lies_on_it():
    def forward(m, x):
        x = m.linear(x)
        x = torch.relu(m.norm(x + m.f(x)))
        x = x + m.g(x)
        return (x + m.h(x),)

    plan = plan_of(forward)
    assert [(p.trunk, p.step, p.dim, p.width, p.is_entry) for p in plan.sites] == [
        (0, 0, -1, 8, True),
        (0, 1, -1, 8, False),
        (0, 2, -1, 8, False),
    ]
    names = [[op_name(node) for node in p.region] for p in plan.sites]
    assert names == [[], ["layer_norm", "relu"], []]
    assert plan.sites[1].start is plan.sites[1].region[-1]
    assert plan.trunks == [plan.sites]


def test_a_refused_site_in_the_middle_cuts_the_trunk():
    def forward(m, x):
        for branch in (m.f, m.g, m.h):
            x = x + branch(x)
        return (x,)

    plan = planned(traced(Net(forward), torch.randn(SHAPE)), refused={1: "excluded"})
    assert [[p.index for p in trunk] for trunk in plan.trunks] == [[0], [2]]


def test_a_site_on_the_way_of_another_branch_starts_a_trunk_of_its_own():
    def forward(m, x):
        x = x + m.f(x)
        z = m.norm(x)
        z = z + m.g(z)
        z = z + m.g(z)
        return (x + m.linear(z),)

    plan = plan_of(forward)
    sites = sorted([p.index for p in trunk] for trunk in plan.trunks)
    assert sites == [[0, 3], [1, 2]]


# ----------------------------------------------------------------------------------- boundaries


def test_an_input_and_an_output_are_where_streams_may_cross():
    plan = plan_of(lambda m, x: (m.norm(x + m.f(x)), x * 2))
    (arrival,), (departure,) = plan.arrivals, plan.departures
    assert arrival.value is plan.sites[0].start
    assert arrival.dim == departure.dim == -1
    assert departure.position == 0
    assert [node.name for node in departure.region] == [departure.value.name]
    assert plan.dims[departure.value] == -1


def test_a_trunk_that_starts_and_ends_inside_its_graph_crosses_nothing():
    def forward(m, x):
        x = m.linear(x)
        return (m.linear(x + m.f(x)),)

    plan = plan_of(forward)
    assert (plan.arrivals, plan.departures) == ([None], [None])


def test_a_parameter_is_no_place_for_streams_to_arrive():
    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.f = nn.Parameter(torch.randn(SHAPE)), Branch()

        def forward(self, x):
            return self.start + self.f(self.start) + 0 * x

    plan = planned(traced(Latent(), torch.randn(SHAPE)))
    assert plan.arrivals == [None]


def test_no_streams_arrive_at_a_projected_skip():
    plan = plan_of(lambda m, x: (m.linear(x) + m.f(x),))
    assert plan.sites[0].site.form == "projection"
    assert plan.arrivals == [None]


def test_an_output_behind_something_that_mixes_shows_no_trunk():
    plan = plan_of(lambda m, x: (m.linear(x + m.f(x)), F.softmax(x, -1)))
    assert plan.departures == [None]
