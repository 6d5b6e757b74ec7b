import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.opnames import is_in_place, op_name
from mhc_compile.passes.owners import module_calls
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.values import dtype_of
from tests.passes.graphs import Builder
from tests.passes.rewriting import Traced, assert_same, exported, output_weights, traced


class Model(nn.Module):
    """``forward`` as given, with two linear layers and a dropout to use."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.body = forward

    def forward(self, *args):
        return self.body(self, *args)


def canonical(t: Traced, tolerance: float = 1e-6) -> Traced:
    """Canonicalize and hold the result against the original: outputs, gradients, twice = once."""
    outputs, gradients = t.run(), t.gradients()
    t.gm.graph.lint()
    assert canonicalize_pass(t.gm, ()).modified
    t.gm.graph.lint()
    t.gm.recompile()
    assert_same(t.run(), outputs, 1e-6)
    assert_same(t.gradients(), gradients, tolerance)
    text = str(t.gm.graph)
    assert not canonicalize_pass(t.gm, ()).modified
    assert str(t.gm.graph) == text
    return t


def in_place(t):
    return [node for node in t.gm.graph.nodes if is_in_place(node)]


def test_a_plain_graph_is_left_alone():
    t = traced(Model(lambda m, x: x + torch.relu(m.a(x))), torch.randn(2, 4))
    text = str(t.gm.graph)
    assert not canonicalize_pass(t.gm, ()).modified
    assert str(t.gm.graph) == text


# ------------------------------------------------------------------------------- empty casts


def to(m, x):
    return x + m.a(x.to(torch.float32))


def named(m, x):
    return x.float() + m.a(x).float()


def read_and_written(m, x):
    y = m.a(x)
    same = y.to(torch.float32)
    same += x
    return y, same


@pytest.mark.parametrize("capture", [traced, exported], ids=lambda f: f.__name__)
@pytest.mark.parametrize("forward", [to, named, read_and_written], ids=lambda f: f.__name__)
def test_a_cast_to_the_same_dtype_goes(capture, forward):
    t = canonical(capture(Model(forward), torch.randn(2, 4)))
    assert not {"to", "float", "_assert_tensor_metadata"} & set(t.ops())


@pytest.mark.parametrize("capture", [traced, exported], ids=lambda f: f.__name__)
def test_a_cast_that_changes_or_copies_stays(capture):
    def forward(m, x):
        copy = x.to(torch.float32, copy=True)
        copy *= 2.0
        return m.a(copy).to(torch.float64), x.double(), x

    t = capture(Model(forward), torch.randn(2, 4))
    casts = [name for name in t.ops() if name in ("to", "double", "_to_copy")]
    assert len(casts) == 3
    outputs = t.run()
    canonicalize_pass(t.gm, ())
    assert [name for name in t.ops() if name in casts] == casts
    for was, now in zip(outputs, t.run(), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


# ------------------------------------------------------------------------------ in-place forms


def iadd(m, x):
    y = m.a(x)
    y += m.b(x)
    return y


def add_(m, x):
    return m.a(x).add_(m.b(x))


def mul_(m, x):
    return m.a(x).mul_(0.5).add_(x)


def relu_(m, x):
    return torch.relu_(m.a(x))


def relu_method(m, x):
    return m.a(x).relu_()


def relu_keyword(m, x):
    return F.relu(input=m.a(x), inplace=True)


def relu_positional(m, x):
    return F.relu(m.a(x), True)


def leaky_relu_(m, x):
    return F.leaky_relu_(m.a(x), 0.2)


def dropout_positional(m, x):
    return F.dropout(m.a(x), 0.5, True, True)


def sub_div_pow(m, x):
    x = m.a(x)
    x -= 1.0
    x /= 2.0
    x **= 2
    return x


def masked_fill_(m, x):
    return m.a(x).masked_fill_(x > 0, 0.0)


def read_before_and_after(m, x):
    y = m.a(x)
    before = torch.exp(y)
    y += m.b(x)
    return before, torch.exp(y), y.view(-1)


def chain(m, x):
    y = m.a(x)
    y += x
    y.relu_()
    z = y * y
    z += m.b(y)
    return z, y


IN_PLACE = [
    iadd, add_, mul_, relu_, relu_method, relu_keyword, relu_positional, leaky_relu_,
    dropout_positional, sub_div_pow, masked_fill_, read_before_and_after, chain,
]  # fmt: skip


@pytest.mark.parametrize("forward", IN_PLACE, ids=lambda f: f.__name__)
def test_a_write_that_nobody_else_sees_becomes_plain(forward):
    t = traced(Model(forward), torch.randn(2, 4))
    assert in_place(t)
    names = t.ops()
    assert canonical(t).ops() == names
    assert not in_place(t)


@pytest.mark.parametrize(
    "forward", [iadd, add_, mul_, relu_method, chain], ids=lambda f: f.__name__
)
def test_a_write_in_an_exported_graph_becomes_plain(forward):
    t = exported(Model(forward), torch.randn(2, 4))
    assert in_place(t)
    canonical(t)
    assert not in_place(t)
    assert all(node.op != "call_method" for node in t.gm.graph.nodes)


def view_before(m, x):
    y = m.a(x)
    view = y.view(-1)
    y += m.b(x)
    return y, view * 2


def write_to_view(m, x):
    y = m.a(x)
    y.view(-1).add_(1.0)
    return y


def write_to_slice(m, x):
    y = m.a(x)
    y[:, 0] += 1.0
    return y


def write_to_input(m, x):
    x += 1.0
    return m.a(x)


def random_in_place(m, x):
    return m.a(x).detach().clone().bernoulli_(0.5) * m.b(x)


@pytest.mark.parametrize(
    "forward", [view_before, write_to_view, write_to_slice, write_to_input, random_in_place],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_write_that_another_name_sees_stays(forward):
    t = traced(Model(forward), torch.randn(2, 4))
    text = str(t.gm.graph)
    assert not canonicalize_pass(t.gm, ()).modified
    assert str(t.gm.graph) == text
    assert any(is_in_place(n) or op_name(n) == "setitem" for n in t.gm.graph.nodes)


def test_in_place_sums_keep_the_dtype_of_their_target():
    def forward(m, x):
        y = m.a(x).bfloat16()
        y += m.b(x)
        y *= x
        return y, y + x

    t = canonical(traced(Model(forward), torch.randn(2, 4)), torch.finfo(torch.bfloat16).eps)
    (add,) = [n for n in t.gm.graph.nodes if op_name(n) == "add" and n.target is operator.add][:1]
    assert dtype_of(add) == torch.float32
    assert t.run()[0].dtype == torch.bfloat16
    assert t.ops().count("to") == 2


def test_a_scalar_tensor_does_not_promote_an_in_place_sum():
    b = Builder()
    x = b.call(torch.neg, b.input(4, dtype=torch.bfloat16))
    write = b.call(operator.imul, x, b.input())
    gm = GraphModule(nn.Module(), b.output(write))
    canonicalize_pass(gm, ())
    assert [op_name(n) for n in gm.graph.nodes if n.op.startswith("call")] == ["neg", "mul"]


def test_an_in_place_residual_is_found_and_both_orders_count():
    def forward(m, x):
        f = m.b(torch.relu(m.a(x)))
        f += x
        f.relu_()
        g = m.b(torch.relu(m.a(f)))
        return g.add_(f)

    t = canonical(traced(Model(forward), torch.randn(2, 4)))
    found = find_residuals(t.gm.graph)
    assert [site.form for site in found.sites] == ["identity", "identity"]
    assert found.trunks == ((0, 1),)


# --------------------------------------------------------------------------------- scaled adds


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.add(x, m.a(x), alpha=0.5),
        lambda m, x: torch.add(x, other=m.a(x), alpha=0.5),
        lambda m, x: x.add(m.a(x), alpha=0.5),
        lambda m, x: m.b(x).add_(m.a(x), alpha=0.5),
        lambda m, x: torch.add(input=x, other=m.a(x), alpha=2),
    ],
)
def test_a_scaled_add_becomes_a_product_and_an_add(forward):
    for t in (
        traced(Model(forward), torch.randn(2, 4)),
        exported(Model(forward), torch.randn(2, 4)),
    ):
        canonical(t)
        assert [name for name in t.ops() if name in ("mul", "add")] == ["mul", "add"]
        assert all("alpha" not in node.kwargs for node in t.gm.graph.nodes)


def test_a_difference_keeps_its_alpha():
    t = traced(Model(lambda m, x: torch.sub(x, m.a(x), alpha=0.5)), torch.randn(2, 4))
    assert not canonicalize_pass(t.gm, ()).modified


def test_an_added_number_keeps_its_alpha():
    t = traced(Model(lambda m, x: torch.add(m.a(x), 1.0, alpha=0.5)), torch.randn(2, 4))
    assert not canonicalize_pass(t.gm, ()).modified


# ---------------------------------------------------------------------------- checkpoint bodies


def run_checkpoint(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def tags(t, name):
    return [n.meta.get("ac_graph_id") for n in t.gm.graph.nodes if op_name(n) == name]


def test_a_checkpoint_body_becomes_part_of_the_graph_and_is_tagged():
    def forward(m, x):
        return run_checkpoint(lambda y: torch.relu(m.a(y)), x) + x

    t = canonical(traced(Model(forward), torch.randn(2, 4)))
    assert t.ops() == ["linear", "relu", "add"]
    recompute = [n.meta.get("recompute") for n in t.gm.graph.nodes if n.op == "call_function"]
    assert recompute == [CheckpointPolicy.MUST_RECOMPUTE] * 2 + [None]
    assert tags(t, "relu") == [0]
    assert all(n.op != "get_attr" for n in t.gm.graph.nodes)


def test_several_outputs_and_unused_ones_of_a_body_are_connected():
    def forward(m, x):
        first, _unused, same = run_checkpoint(lambda y: (m.a(y), m.b(y), y), x)
        return first * same

    t = canonical(traced(Model(forward), torch.randn(2, 4)))
    assert "getitem" not in t.ops()


def test_nested_bodies_are_inlined_and_told_apart():
    def forward(m, x):
        def outer(y):
            return run_checkpoint(lambda z: torch.tanh(m.a(z)), torch.relu(m.b(y)))

        return torch.exp(run_checkpoint(outer, x))

    t = canonical(traced(Model(forward), torch.randn(2, 4)))
    assert t.ops() == ["linear", "relu", "linear", "tanh", "exp"]
    assert tags(t, "exp") == [None]
    assert tags(t, "relu") != tags(t, "tanh")


def test_random_numbers_in_a_body_stay_the_same():
    def forward(m, x):
        for _ in range(2):
            x = x + run_checkpoint(lambda y: m.drop(m.a(y)), x)
        return x

    model, x = Model(forward), torch.randn(2, 4)
    t = traced(model, x)
    torch.manual_seed(0)
    expected = model(x)
    canonicalize_pass(t.gm, ())
    t.gm.recompile()
    assert t.ops().count("dropout") == 2
    assert torch.equal(t.run()[0], expected)
    # The graph itself would draw anew in its backward; the eager model does not.
    weight = next(node for node in t.gm.graph.nodes if "weight" in node.name)
    position = list(t.gm.graph.find_nodes(op="placeholder")).index(weight)
    torch.manual_seed(0)
    model(x).mul(output_weights(expected)).sum().backward()
    inputs = [value for value in t.inputs if value.is_floating_point()]
    assert len(inputs) == len(t.inputs)
    assert_same([t.gradients()[position]], [model.a.weight.grad], 1e-5)


def test_a_body_with_constants_of_its_own_keeps_them():
    table = torch.randn(4)

    def forward(m, x):
        x = run_checkpoint(lambda y: m.a(y) * torch.tensor([1.0, 2.0, 3.0, 4.0]), x)
        return run_checkpoint(lambda y: m.b(y) * torch.tensor([4.0, 3.0, 2.0, 1.0]) + table, x)

    canonical(traced(Model(forward), torch.randn(2, 4)))


def test_a_selective_checkpoint_is_left_to_its_policy():
    def policy(_ctx, op, *_args, **_kwargs):
        saved = op == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def context():
        return create_selective_checkpoint_contexts(policy)

    def forward(m, x):
        return checkpoint(lambda y: torch.relu(m.a(y)), x, use_reentrant=False, context_fn=context)

    t = traced(Model(forward), torch.randn(2, 4))
    assert not canonicalize_pass(t.gm, ()).modified
    assert "higher_order.tag_activation_checkpoint" in t.ops()


class Block(nn.Module):
    """Adds outside and inside of a checkpoint body, in one forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def mlp(self, x):
        return x + torch.relu(self.b(x))

    def forward(self, x):
        x = x + torch.relu(self.a(x))
        return run_checkpoint(self.mlp, x)


def test_adds_inside_and_outside_a_body_belong_to_one_call():
    t = canonical(traced(nn.Sequential(Block(), Block()), torch.randn(2, 4)))
    calls = [module_calls(n)[-1] for n in t.gm.graph.nodes if op_name(n) == "add"]
    assert calls[0] == calls[1] != calls[2] == calls[3]


def test_a_write_in_a_body_becomes_plain_like_any_other():
    def forward(m, x):
        def body(y):
            f = m.a(torch.relu(m.b(y)))
            f += y
            return f

        return run_checkpoint(body, m.a(x))

    t = canonical(traced(Model(forward), torch.randn(2, 4)))
    assert not in_place(t)
    assert len(find_residuals(t.gm.graph).sites) == 1
