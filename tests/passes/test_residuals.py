"""Which sums are residual sites: clauses 1 to 7 where they hold, and how a site is described."""

import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder
from tests.passes.residual_graphs import SHAPE, ffn, only_rejection, only_site


@pytest.mark.parametrize("skip_first", [True, False])
def test_plain_residual_is_found_in_both_operand_orders(skip_first):
    b = Builder()
    x = b.input(*SHAPE)
    f = ffn(b, x)
    root = b.call(operator.add, *((x, f) if skip_first else (f, x)))
    site = only_site(b.output(root))
    assert (site.root, site.skip, site.origin, site.branches) == (root, x, x, (f,))
    assert (site.skip_path, site.inner, site.form, site.traits) == ((), (), "identity", ())


@pytest.mark.parametrize(
    ("spelling", "traits"),
    [
        (lambda b, f, x: b.call(torch.add, f, x), ()),
        (lambda b, f, x: b.call(torch.add, f, other=x), ()),
        (lambda b, f, x: b.method("add", f, x), ()),
        (lambda b, f, x: b.call(operator.iadd, f, x), ("in place",)),
        (lambda b, f, x: b.method("add_", f, x), ("in place",)),
        (lambda b, f, x: b.call(torch.add, f, x, alpha=0.5), ("alpha",)),
        (lambda b, f, x: b.call(torch.ops.aten.add.Tensor, f, x), ()),
        (lambda b, f, x: b.call(torch.ops.aten.add_.Tensor, f, x), ("in place",)),
    ],
)
def test_every_spelling_of_the_add_is_found(spelling, traits):
    b = Builder()
    x = b.input(*SHAPE)
    site = only_site(b.output(spelling(b, ffn(b, x), x)))
    assert site.skip is x
    assert site.traits == traits


def test_parallel_branches_are_one_site_of_three_leaves():
    b = Builder()
    x = b.input(*SHAPE)
    f, g = ffn(b, x), b.linear(x)
    inner = b.call(operator.add, f, g)
    root = b.call(operator.add, inner, x)
    site = only_site(b.output(root))
    assert (site.root, site.skip, site.branches, site.inner) == (root, x, (f, g), (inner,))
    assert (site.form, site.traits) == ("parallel", ("parallel",))


def test_four_leaves_with_the_skip_in_the_middle_are_one_site():
    b = Builder()
    x = b.input(*SHAPE)
    fs = [b.linear(x) for _ in range(3)]
    total = b.call(operator.add, fs[0], x)
    total = b.call(operator.add, total, fs[1])
    site = only_site(b.output(b.call(operator.iadd, total, fs[2])))
    assert site.skip is x
    assert site.branches == tuple(fs)
    assert len(site.inner) == 2


def test_constant_leaf_beside_skip_and_branch_makes_no_parallel_site():
    b = Builder()
    x, bias = b.input(*SHAPE), b.parameter(4)
    f = b.call(operator.add, ffn(b, x), bias)
    site = only_site(b.output(b.call(operator.iadd, f, x)))
    assert site.form == "identity"
    assert len(site.branches) == 2


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda b, x: b.call(operator.mul, x, 0.5), "scaled skip"),
        (lambda b, x: b.call(operator.truediv, x, 2.0), "scaled skip"),
        (lambda b, x: b.call(operator.mul, b.parameter(4), x), "scaled skip"),
        (lambda b, x: b.method("to", x, torch.float64), "cast skip"),
        (lambda b, x: b.method("view", x, *SHAPE), "viewed skip"),
        (lambda b, x: b.call(F.dropout, x, 0.1), "dropout skip"),
        (lambda b, x: b.method("float", b.call(operator.mul, x, 2)), "scaled skip"),
    ],
)
def test_skip_may_be_scaled_cast_viewed_or_dropped(make, form):
    b = Builder()
    x = b.input(*SHAPE)
    f = ffn(b, x)
    skip = make(b, x)
    site = only_site(b.output(b.call(operator.add, skip, f)))
    assert (site.skip, site.origin, site.form) == (skip, x, form)
    assert site.skip_path[0] is skip
    assert x not in site.skip_path


def test_factor_random_mask_on_the_skip_is_a_constant():
    b = Builder()
    x = b.input(*SHAPE)
    mask = b.method("bernoulli_", b.method("new_empty", x, 2, 1, 1), 0.9)
    skip = b.call(operator.mul, x, mask)
    assert only_site(b.output(b.call(operator.add, skip, ffn(b, x)))).origin is x


def test_ends_of_the_branch_are_named():
    b = Builder()
    x, condition = b.input(*SHAPE), b.input(2, 1, 4)
    ends = {
        "dropout": lambda f: b.call(F.dropout, f, 0.1, True),
        "scaled branch": lambda f: b.call(operator.mul, f, 0.22),
        "layer scale": lambda f: b.call(operator.mul, f, b.parameter(4)),
        "gate": lambda f: b.call(operator.mul, condition, f),
    }
    roots = [b.call(operator.add, x, end(ffn(b, x))) for end in ends.values()]
    found = find_residuals(b.output(*roots))
    assert [site.traits for site in found.sites] == [(name,) for name in ends]


def test_second_activation_source_in_the_branch_does_no_harm():
    b = Builder()
    x, memory = b.input(*SHAPE), b.input(2, 9, 4)
    attention = b.call(F.scaled_dot_product_attention, b.linear(x), b.linear(memory), memory)
    site = only_site(b.output(b.call(operator.add, x, b.linear(attention))))
    assert site.origin is x


def test_trunk_may_start_from_zeros_or_a_parameter():
    b = Builder()
    memory, latent = b.input(*SHAPE), b.parameter(*SHAPE)
    zeros = b.call(torch.zeros_like, memory)
    roots = [
        b.call(operator.add, start, b.call(F.scaled_dot_product_attention, start, memory, memory))
        for start in (zeros, latent)
    ]
    found = find_residuals(b.output(*roots))
    assert [site.origin for site in found.sites] == [zeros, latent]


def test_code_the_graph_does_not_show_counts_as_mixing():
    b = Builder()
    x = b.input(*SHAPE)
    f = b.graph.call_module("block", (x,))
    f.meta["example_value"] = x.meta["example_value"]
    assert only_site(b.output(b.call(operator.add, x, f))).branches == (f,)


@pytest.mark.parametrize(
    "mix",
    [
        lambda b, x: b.call(torch.cumsum, x, 1),
        lambda b, x: b.call(F.avg_pool1d, x, 3, 1, 1),
        lambda b, x: b.call(getattr, b.call(torch.fft.fft, x), "real"),
        lambda b, x: b.call(torch.matmul, x, b.parameter(4, 4)),
        lambda b, x: b.call(torch.einsum, "btc,cd->btd", x, b.parameter(4, 4)),
    ],
)
def test_pooling_fft_sums_and_products_mix(mix):
    b = Builder()
    x = b.input(*SHAPE)
    f = b.call(torch.relu, mix(b, x))
    only_site(b.output(b.call(operator.add, x, f)))


def test_inner_adds_of_a_rejected_sum_are_listed():
    b = Builder()
    a, c, d = (b.input(*SHAPE) for _ in range(3))
    inner = b.call(operator.add, a, c)
    root = b.call(operator.add, inner, d)
    found = find_residuals(b.output(root))
    assert [(entry.root, entry.clause) for entry in found.rejected] == [
        (inner, "origin"),
        (root, "origin"),
    ]
    assert "part of the sum" in found.rejected[0].reason


def test_latest_origin_wins_where_two_leaves_could_be_the_skip():
    b = Builder()
    x = b.input(*SHAPE)
    y = b.call(torch.relu, b.linear(x))
    total = b.call(operator.add, b.linear(y), y)
    site = find_residuals(b.output(b.call(operator.add, total, x))).sites[0]
    assert site.origin is y


def test_value_added_to_itself_is_no_residual():
    b = Builder()
    x = b.input(*SHAPE)
    assert only_rejection(b.output(b.call(operator.add, x, x), b.linear(x))).clause == "mixing"


def test_finding_changes_nothing():
    b = Builder()
    x = b.input(*SHAPE)
    graph = b.output(b.call(operator.iadd, ffn(b, x), x))
    before, metas = str(graph), [dict(node.meta) for node in graph.nodes]
    assert find_residuals(graph) == find_residuals(graph)
    assert str(graph) == before
    assert all(
        node.meta.keys() == meta.keys() for node, meta in zip(graph.nodes, metas, strict=True)
    )


def test_one_half_of_a_split_is_no_copy_of_the_other():
    b = Builder()
    halves = b.call(torch.chunk, b.input(2, 4, 6), 2, -1)
    left, right = (b.call(operator.getitem, halves, i) for i in range(2))
    found = find_residuals(b.output(b.call(operator.add, left, b.linear(right))))
    assert not found.sites
    assert [entry.clause for entry in found.rejected] == ["origin"]
