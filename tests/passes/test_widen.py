from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mhc_compile.kernels.reference import post_ref, pre_ref
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.widen import Widening, widen_trunks_pass
from tests.passes.programs import Branch, ConvBranch
from tests.passes.rewriting import SPEC, assert_same, exported, planned, traced, widen

SHAPE = (2, 3, 8)


class Net(nn.Module):
    """``forward`` as given, with branches to use."""

    def __init__(self, forward):
        super().__init__()
        self.f, self.g, self.h = Branch(), Branch(), Branch()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.latent = nn.Parameter(torch.randn(SHAPE))
        self.body = forward

    def forward(self, *args):
        return self.body(self, *args)


def preserved(forward, *args, trace=traced, outputs=2e-6, gradients=1e-5):
    """Widen; the function must not change. The traced graph and the plan."""
    args = args or (torch.randn(SHAPE),)
    t = trace(Net(forward), *args)
    old, grads = t.run(), t.gradients()
    t.gm.graph.lint()
    plan = widen(t)
    assert_same(t.run(), old, outputs)
    scale = max(float(g.abs().max()) for g in grads if g is not None)
    for new, true in zip(t.gradients()[: len(grads)], grads, strict=True):
        assert (new is None) == (true is None)
        if true is not None:
            assert float((new - true).abs().max()) <= gradients * scale
    return t, plan


def counts(t):
    names = Counter(op_name(node) for node in t.gm.graph.nodes if node.op.startswith("call"))
    return tuple(names[f"mhc.{name}"] for name in ("expand", "pre", "post", "collapse"))


def nodes(t, name):
    return [node for node in t.gm.graph.nodes if op_name(node) == name]


# ------------------------------------------------------------------------------ what comes in


@pytest.mark.parametrize("trace", [traced, exported])
def test_a_trunk_has_one_expand_a_pre_and_post_per_site_and_one_collapse(trace):
    def forward(m, x):
        x = m.linear(x)
        for branch in (m.f, m.g, m.h):
            x = x + branch(x)
        return (m.linear(x),)

    t, plan = preserved(forward, trace=trace)
    assert counts(t) == (1, 3, 3, 1)
    assert "add" not in t.ops()
    assert [len(trunk) for trunk in plan.trunks] == [3]


def test_a_graph_without_sites_is_left_alone():
    t = traced(Net(lambda m, x: (m.linear(x) * x,)), torch.randn(SHAPE))
    text = str(t.gm.graph)
    plan = planned(t)
    result = widen_trunks_pass(t.gm, (), widening=Widening(plan, {}))
    assert result == PassResult(t.gm, False)
    assert str(t.gm.graph) == text


def test_a_refused_site_stays_a_plain_add():
    def forward(m, x):
        x = x + m.f(x)
        return (x + m.g(x),)

    t = traced(Net(forward), torch.randn(SHAPE))
    old = t.run()
    plan = widen(t, refused={0: "for the test"})
    assert plan.left == {0: "for the test"}
    assert counts(t) == (1, 1, 1, 1)
    assert t.ops().count("add") == 1
    assert_same(t.run(), old)


def test_old_nodes_keep_their_names_and_no_dead_ones_stay():
    def forward(m, x):
        x = m.norm(x + m.f(x) + m.g(x))
        x = torch.relu(0.5 * x + m.h(x))
        return (m.linear(x),)

    t = traced(Net(forward), torch.randn(SHAPE))
    old = {node.name for node in t.gm.graph.nodes}
    plan = widen(t)
    replaced = {p.site.root.name for p in plan.sites}
    new = {node.name for node in t.gm.graph.nodes}
    assert {"linear_6", "tanh"} <= old & new
    assert not replaced & new
    assert all(node.users for node in t.gm.graph.nodes if node.op.startswith("call"))


def test_what_reads_a_trunk_in_its_middle_reads_the_collapse_there():
    def forward(m, x):
        x = m.linear(x)
        x = x + m.f(x)
        middle = m.linear(x)
        x = x + m.g(x)
        return x, middle, x.sum()

    t, _ = preserved(forward)
    assert counts(t) == (1, 2, 2, 2)
    assert [len(node.users) for node in nodes(t, "mhc.collapse")] == [1, 2]


def test_readers_before_the_first_site_read_the_plain_value():
    t, _ = preserved(lambda m, x: (x + m.f(x), torch.exp(x)))
    (exp,) = nodes(t, "exp")
    assert exp.args[0].op == "placeholder"


def test_a_reader_of_shapes_needs_no_collapse():
    def forward(m, x):
        x = m.linear(x)
        x = x + m.f(x)
        return (x + m.g(x) * torch.ones_like(x),)

    t, _ = preserved(forward)
    assert counts(t) == (1, 2, 2, 1)


# -------------------------------------------------------------------------------------- forms


def test_two_sites_on_one_origin_share_its_streams():
    t, plan = preserved(lambda m, x: ((x + m.f(x)) * torch.sigmoid(x + m.g(x)),))
    assert counts(t) == (1, 2, 2, 2)
    assert [site.trunk for site in plan.sites] == [0, 0]


def test_a_site_can_start_at_the_skip_of_another():
    def forward(m, x):
        half = 0.5 * x
        return half + m.f(x), half + m.g(half)

    _, plan = preserved(forward)
    assert [site.trunk for site in plan.sites] == [0, 0]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + m.f(x) + m.g(x),
        lambda m, x: m.f(x) + m.g(x) + x,
        lambda m, x: x + (m.f(x) + m.g(x)) + m.h(x),
        lambda m, x: (m.f(x) + x) + (m.g(x) + m.h(x)),
    ],
)
def test_parallel_branches_are_summed_before_one_post(body):
    t, plan = preserved(lambda m, x: (body(m, x),))
    branches = len(plan.sites[0].site.branches)
    assert counts(t) == (1, 1, 1, 1)
    assert t.ops().count("add") == branches - 1


@pytest.mark.parametrize(
    "branch",
    [
        lambda m, x: m.f(x).mean((0, 1)),
        lambda m, x: m.f(x).mean(1, keepdim=True),
        lambda m, x: m.f(x).mean(-1, keepdim=True),
        lambda m, x: m.f(x).sum(),
    ],
)
def test_a_branch_that_is_broadcast_is_written_to_every_place(branch):
    t, _ = preserved(lambda m, x: (x + branch(m, x),))
    assert counts(t) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("skip", "branch", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_sum_of_two_dtypes_keeps_the_dtype_of_the_sum(skip, branch, result):
    def forward(m, x):
        x = m.linear(x).to(skip)
        x = x + m.f(x.float()).to(branch)
        return (x,)

    tolerance = 2e-2 if torch.bfloat16 in (skip, branch) else 1e-5
    t, _ = preserved(forward, outputs=tolerance, gradients=tolerance)
    assert t.run()[0].dtype == result


def test_branches_of_lower_precision_are_summed_in_that_of_the_sum():
    def forward(m, x):
        x = m.linear(x)
        return (x + m.f(x).bfloat16() + m.g(x).bfloat16(),)

    preserved(forward, gradients=2e-2)


def test_a_projected_skip_starts_new_streams():
    def forward(m, x):
        x = x + m.g(x)
        x = m.linear(x) + m.f(x)
        return (x + m.h(x),)

    t, plan = preserved(forward)
    assert counts(t) == (2, 3, 3, 2)
    assert plan.sites[1].start is plan.sites[1].site.skip


ON_TRUNK = {
    "post-norm": lambda m, x: m.norm(x),
    "rms norm": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "relu": lambda m, x: torch.relu(x),
    "relu in place": lambda m, x: F.relu(x, True),
    "division": lambda m, x: x / 2**0.5,
    "dropout": lambda m, x: F.dropout(x, 0.3, True),
    "mask": lambda m, x: x.masked_fill(torch.arange(3)[:, None] > 1, 0.0),
    "cast": lambda m, x: x.double(),
    "rows": lambda m, x: x.view(-1, 8),
    "gate": lambda m, x: x * torch.sigmoid(m.latent),
}


def test_a_skip_that_is_a_slice_starts_new_streams_and_the_trunk_behind_it_goes_on():
    def forward(m, x):
        x = x + m.f(x)
        first = x[:, :1] + m.g(x.flip(1).cumsum(1))[:, :1]  # reads all tokens, adds to the first
        return (torch.cat([first + m.h(first), x[:, 1:]], 1),)

    t, plan = preserved(forward)
    assert [site.site.form for site in plan.sites] == ["identity", "slice", "identity"]
    assert [len(trunk) for trunk in plan.trunks] == [1, 2]
    assert counts(t) == (2, 3, 3, 2)


@pytest.mark.parametrize("trace", [traced, exported])
def test_a_residual_around_a_slice_mixes_the_streams_of_that_slice(trace):
    t, plan = preserved(lambda m, x: (x[:, 1:] + m.f(x[:, 1:]),), trace=trace)
    assert [site.site.form for site in plan.sites] == ["identity"]
    assert counts(t) == (1, 1, 1, 1)


@pytest.mark.parametrize("operation", ON_TRUNK.values(), ids=ON_TRUNK)
def test_an_operation_on_the_trunk_acts_on_the_streams(operation):
    def forward(m, x):
        x = operation(m, x + m.f(x))
        x = x + m.g(x.float()).to(x.dtype)
        return (operation(m, x),)

    t, plan = preserved(forward)
    assert [len(trunk) for trunk in plan.trunks] == [2]
    assert counts(t) == (1, 2, 2, 1)


def test_a_mask_that_comes_from_outside_acts_on_the_streams():
    def forward(m, x, mask):
        x = (x + m.f(x)) * mask.unsqueeze(-1)
        return (x + m.g(x),)

    t, plan = preserved(forward, torch.randn(SHAPE), torch.ones(SHAPE[:2]))
    assert counts(t) == (1, 2, 2, 1)
    assert [len(trunk) for trunk in plan.trunks] == [2]


def test_an_operation_without_a_form_for_streams_ends_the_trunk():
    def forward(m, x):
        x = torch.cumsum(x + m.f(x), 1)
        return (x + m.g(x),)

    t, plan = preserved(forward)
    assert [len(trunk) for trunk in plan.trunks] == [1, 1]
    assert counts(t) == (2, 2, 2, 2)


def test_batch_statistics_end_the_trunk_in_train_and_in_eval_mode():
    def forward(m, x):
        mean, var = torch.zeros(3), torch.ones(3)
        x = F.batch_norm(x + m.f(x), mean, var, training=m.training)
        return (x + m.g(x),)

    for training in (True, False):
        t = traced(Net(forward).train(training), torch.randn(SHAPE))
        assert [len(trunk) for trunk in planned(t).trunks] == [1, 1]


def test_a_scaled_skip_scales_every_stream():
    t, plan = preserved(lambda m, x: (0.5 * x + 2 * m.f(x),))
    assert plan.sites[0].site.form == "scaled skip"
    (post,) = nodes(t, "mhc.post")
    assert op_name(post.args[0]) == "mul"


def test_a_trunk_can_start_from_a_parameter_or_a_constant():
    def forward(m, x):
        a = m.latent + m.f(m.latent)
        zeros = torch.zeros(SHAPE)
        return a * x, zeros + m.g(zeros)

    for trace in (traced, exported):
        t, plan = preserved(forward, trace=trace)
        assert counts(t) == (2, 2, 2, 2)
        assert plan.arrivals == [None, None]


def test_two_trunks_stay_apart_where_they_meet():
    def forward(m, x, y):
        for branch in (m.f, m.g):
            x = x + branch(x)
            y = y + branch(y + x)
        return x, y

    t, plan = preserved(forward, torch.randn(SHAPE), torch.randn(SHAPE))
    assert [len(trunk) for trunk in plan.trunks] == [2, 2]
    assert counts(t) == (2, 4, 4, 3)


def test_a_trunk_inside_a_branch_reads_the_mixed_streams():
    def forward(m, x):
        z = m.norm(x)
        z = z + m.f(z)
        z = z + m.g(z)
        return (x + m.linear(z),)

    t, plan = preserved(forward)
    assert sorted(len(trunk) for trunk in plan.trunks) == [1, 2]
    (norm,) = [n for n in nodes(t, "layer_norm") if op_name(n.args[0].args[0]) == "mhc.pre"][:1]
    assert op_name(norm.args[0]) == "getitem"


def test_a_convolution_keeps_its_channels_second():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ConvBranch(), ConvBranch()

        def forward(self, x):
            x = torch.relu(x + self.a(x))
            return x + self.b(x)

    t = traced(Conv(), torch.randn(2, 8, 5))
    old = t.run()
    plan = widen(t)
    assert [site.dim for site in plan.sites] == [-2, -2]
    assert_same(t.run(), old)


def test_in_place_sums_and_activations_are_widened():
    def forward(m, x):
        f = m.f(x)
        f += x
        f = F.relu(f, inplace=True)
        g = m.g(f)
        g += f
        return (g,)

    t, plan = preserved(forward)
    assert [len(trunk) for trunk in plan.trunks] == [2]
    assert "add" not in t.ops()


# ------------------------------------------------------------------------------- semantics


def parameters(t, index):
    return {name: p.detach() for name, p in t.gm.get_submodule(f"site{index}").named_parameters()}


def test_different_streams_follow_the_equations_of_the_paper():
    """Two sites with a norm and a reader on the trunk, against the eager reference."""

    def forward(m, x):
        x = m.norm(x + m.f(x))
        return m.norm(x + m.g(x)), x

    net, x = Net(forward), torch.randn(SHAPE)
    t = traced(net, x)
    widen(t, noise=1.0)
    X = x[..., None, :].expand(2, 3, SPEC.streams, 8)
    states = []
    for index, branch in enumerate((net.f, net.g)):
        u, h_post, h_res = pre_ref(X, **parameters(t, index), spec=SPEC)
        X = post_ref(X, branch(u), h_post, h_res, SPEC)
        states.append(X := net.norm(X) if index == 0 else X)
    assert not torch.allclose(X[..., 0, :], X[..., 1, :], atol=1e-2)
    expected = net.norm(states[1].mean(-2)), states[0].mean(-2)
    assert_same(t.run(), [e.detach() for e in expected], 1e-5)


# ------------------------------------------------------------------------------------ the rest


def test_new_nodes_carry_line_owner_and_recompute_tags():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = Branch()

        def forward(self, x):
            return F.dropout(x + self.f(x) + torch.sigmoid(self.f(x)), 0.1, True)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    t = traced(Stack(), torch.randn(SHAPE))
    planned(t)
    old = {node.name for node in t.gm.graph.nodes}
    plan = widen(t)
    assert [len(trunk) for trunk in plan.trunks] == [2]
    new = [n for n in t.gm.graph.nodes if n.op.startswith("call") and n.name not in old]
    assert {op_name(n) for n in new} >= {"mhc.expand", "mhc.pre", "mhc.post", "mhc.collapse", "mul"}
    for node in new:
        assert "test_widen.py" in node.meta["stack_trace"]
        assert node.meta["nn_module_stack"]
        assert node.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE
        assert "example_value" not in node.meta


@pytest.mark.parametrize("axis", ["batch", "length"])
def test_sizes_that_vary_stay_symbolic(axis):
    def forward(m, x):
        x = m.norm(x + m.f(x))
        rows = x.flatten(0, 1)
        rows = rows + m.g(rows)
        x = rows.view(x.shape)
        return (x + m.h(x),)

    x = torch.randn(4, 5, 8)
    torch._dynamo.mark_dynamic(x, 0 if axis == "batch" else 1)
    net = Net(forward)
    t = traced(net, x, dynamic=None)
    symbols = [i for i, v in enumerate(t.inputs) if isinstance(v, int)]
    assert len(symbols) == 1
    plan = widen(t)
    assert [len(trunk) for trunk in plan.trunks] == [3]
    shape = (7, 5, 8) if axis == "batch" else (4, 7, 8)
    other = torch.randn(shape)
    t.inputs = [
        7 if i in symbols else other if isinstance(v, torch.Tensor) and v.shape == x.shape else v
        for i, v in enumerate(t.inputs)
    ]
    assert_same(t.run(), [o.detach() for o in net(other)])


@pytest.mark.parametrize("streams", [2, 7])
@pytest.mark.parametrize("constraint", ["identity", "sinkhorn", "orthogonal"])
def test_any_number_of_streams_and_constraint_preserves(streams, constraint):
    t = traced(Net(lambda m, x: (m.norm(x + m.f(x)),)), torch.randn(SHAPE))
    old = t.run()
    widen(t, SiteSpec(streams=streams, constraint=constraint))
    assert_same(t.run(), old)


def test_running_the_passes_again_changes_nothing():
    def forward(m, x):
        x = m.norm(x + m.f(x) + m.g(x))
        x = 0.5 * x + m.f(x).mean(1, keepdim=True)
        y = m.linear(x)
        y = y + m.h(y)
        return x * y, x

    t, plan = preserved(forward)
    assert len(plan.sites) == 3
    text = str(t.gm.graph)
    again = planned(t)
    assert (again.sites, again.left) == ([], {})
    assert not widen_trunks_pass(t.gm, (), widening=Widening(again, {})).modified
    assert str(t.gm.graph) == text
