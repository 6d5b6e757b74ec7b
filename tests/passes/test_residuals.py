import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder

SHAPE = (2, 6, 4)


def ffn(b, x):
    return b.linear(b.call(torch.relu, b.linear(x)))


def only_site(graph):
    found = find_residuals(graph)
    assert len(found.sites) == 1, found
    assert found.rejected == ()
    return found.sites[0]


def only_rejection(graph):
    found = find_residuals(graph)
    assert found.sites == ()
    assert len(found.rejected) == 1, found
    return found.rejected[0]


# ------------------------------------------------------------------------------------- fires


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


def projection_block(b, x, *, bent=True):
    def conv_bn(value, stride):
        weight, norm = b.parameter(8, value.meta["example_value"].shape[1], 1, 1), b.parameter(8)
        y = b.call(torch.conv2d, value, weight, None, stride)
        return b.call(F.batch_norm, y, norm, norm, norm, norm, True)

    f = conv_bn(x, 2)
    f = b.call(torch.relu, f) if bent else f
    return conv_bn(f, 1), conv_bn(x, 2)


def test_projection_skip_is_found_at_the_value_both_sides_read():
    b = Builder()
    x = b.input(2, 4, 8, 8)
    f, skip = projection_block(b, x)
    site = only_site(b.output(b.call(operator.iadd, f, skip)))
    assert (site.form, site.origin, site.skip) == ("projection", x, skip)
    assert len(site.skip_path) == 2


def test_a_part_of_what_the_branch_reads_whole_can_be_the_skip():
    b = Builder()
    x = b.input(*SHAPE)
    first = (slice(None), slice(0, 1))
    keys = b.method("transpose", b.linear(x), 1, 2)
    scores = b.call(torch.matmul, b.linear(b.call(operator.getitem, x, first)), keys)
    f = b.linear(b.call(torch.matmul, b.call(torch.softmax, scores, -1), x))
    skip = b.call(operator.getitem, x, first)
    site = only_site(b.output(b.call(operator.add, skip, f)))
    assert (site.form, site.origin, site.skip) == ("slice", x, skip)


@pytest.mark.parametrize("maximum", ["amax", "max"])
def test_pooling_written_as_view_and_maximum_is_a_projection(maximum):
    b = Builder()
    x = b.input(2, 8, 4)

    def pool(y):
        largest = b.method(maximum, b.method("view", y, 2, 2, 4, -1), 1)
        return largest if maximum == "amax" else b.call(operator.getitem, largest, 0)

    f = b.linear(b.call(torch.softmax, pool(b.linear(x)), -1))
    site = only_site(b.output(b.call(operator.add, pool(b.linear(x)), f)))
    assert (site.form, site.origin) == ("projection", x)


def test_maximum_of_the_tokens_is_no_pooling():
    b = Builder()
    x = b.input(2, 8, 4)
    f = b.linear(b.call(torch.softmax, b.linear(x), -1))
    largest = b.method("amax", b.linear(x), 1, keepdim=True)
    b.call(operator.add, b.method("amax", f, 1, keepdim=True), largest)
    assert find_residuals(b.output(list(b.graph.nodes)[-1])).sites == ()


def test_norm_written_as_mul_and_add_on_a_projection_is_walked():
    b = Builder()
    x = b.input(2, 4, 8, 8)
    f, _ = projection_block(b, x)
    y = b.call(torch.conv2d, x, b.parameter(8, 4, 1, 1), None, 2)
    skip = b.call(operator.add, b.call(operator.mul, y, b.parameter(8, 1, 1)), b.parameter(8, 1, 1))
    found = find_residuals(b.output(b.call(operator.add, f, skip)))
    assert [site.form for site in found.sites] == ["projection"]


# -------------------------------------------------------------------------------- leaves alone


def test_sum_of_two_linear_branches_is_rejected():
    b = Builder()
    x = b.input(2, 4, 8, 8)
    f, skip = projection_block(b, x, bent=False)
    rejected = only_rejection(b.output(b.call(operator.add, f, skip)))
    assert rejected.clause == "linear branches"
    assert "linear" in rejected.reason


def test_graph_without_float_sums_gives_nothing():
    b = Builder()
    x, ids = b.input(*SHAPE), b.input(2, dtype=torch.int64)
    found = find_residuals(
        b.output(b.call(operator.add, b.linear(x), 1), b.call(operator.add, ids, ids))
    )
    assert (found.sites, found.rejected, found.links, found.trunks) == ((), (), (), ())


def test_broadcast_operands_are_rejected_for_their_shape():
    b = Builder()
    rejected = only_rejection(b.output(b.call(operator.add, b.input(2, 1, 4), b.input(1, 6, 4))))
    assert rejected.clause == "shape"
    assert "[2, 6, 4]" in rejected.reason


def test_position_sum_has_no_common_origin():
    b = Builder()
    x, position = b.input(*SHAPE), b.parameter(6, 4)
    rejected = only_rejection(b.output(b.call(operator.add, x, position)))
    assert rejected.clause == "origin"


def test_attention_mask_is_no_skip():
    b = Builder()
    q, mask = b.input(2, 3, 6, 4), b.input(2, 1, 6, 6)
    scores = b.call(torch.matmul, q, b.method("transpose", q, -1, -2))
    assert only_rejection(b.output(b.call(operator.add, scores, mask))).clause == "origin"


def test_rotary_embedding_mixes_nothing():
    b = Builder()
    x, cos, sin = b.input(*SHAPE), b.parameter(6, 4), b.parameter(6, 4)
    q = b.linear(x)
    left = b.call(operator.getitem, q, (Ellipsis, slice(None, 2)))
    right = b.call(operator.getitem, q, (Ellipsis, slice(2, None)))
    turned = b.call(torch.cat, [b.call(operator.neg, right), left], -1)
    rejected = only_rejection(
        b.output(
            b.call(operator.add, b.call(operator.mul, q, cos), b.call(operator.mul, turned, sin))
        )
    )
    assert rejected.clause == "mixing"
    assert f"'{q.name}'" in rejected.reason


def test_gelu_polynomial_is_rejected_even_behind_a_linear():
    b = Builder()
    h = b.linear(b.input(*SHAPE))
    cubic = b.call(operator.mul, b.call(torch.pow, h, 3.0), 0.044715)
    assert only_rejection(b.output(b.call(operator.add, h, cubic))).clause == "mixing"


def test_parts_of_a_value_that_are_worked_on_apart_and_added_up_are_rejected():
    b = Builder()
    x = b.input(*SHAPE)
    kept = b.call(operator.getitem, x, (Ellipsis, slice(2, None)))
    worked = ffn(b, b.call(operator.getitem, x, (Ellipsis, slice(None, 2))))
    assert only_rejection(b.output(b.call(operator.add, worked, kept))).clause == "origin"


def test_position_added_again_to_a_value_read_elsewhere_is_rejected():
    b = Builder()
    x, position = b.input(*SHAPE), b.input(*SHAPE)
    hidden = ffn(b, b.call(operator.add, x, position))
    query = b.call(operator.add, hidden, position)
    found = find_residuals(b.output(query, b.linear(hidden)))
    assert found.sites == ()
    assert [entry.clause for entry in found.rejected] == ["origin", "branch"]


@pytest.mark.parametrize(
    ("groups", "bent", "clause"),
    [(4, False, "positional convolution"), (4, True, "positional convolution"),
     (1, False, "positional convolution"), (1, True, None)],
)  # fmt: skip
def test_lone_convolution_is_a_positional_encoding_unless_it_mixes_channels_and_bends(
    groups, bent, clause
):
    b = Builder()
    x = b.input(2, 6, 4)
    y = b.method("transpose", x, 1, 2)
    y = b.call(torch.conv1d, y, b.parameter(4, 4 // groups, 4), None, 1, 2, 1, groups)
    y = b.call(operator.getitem, y, (slice(None), slice(None), slice(0, -1)))
    y = b.call(F.gelu, y) if bent else y
    graph = b.output(b.call(operator.add, x, b.method("transpose", y, 1, 2)))
    if clause is None:
        only_site(graph)
    else:
        assert only_rejection(graph).clause == clause


def test_convolution_with_norm_is_a_layer():
    b = Builder()
    x, norm = b.input(2, 4, 8, 8), b.parameter(4)
    y = b.call(torch.conv2d, x, b.parameter(4, 1, 3, 3), None, 1, 1, 1, 4)
    y = b.call(F.batch_norm, b.call(F.gelu, y), norm, norm, norm, norm, True)
    only_site(b.output(b.call(operator.add, x, y)))


def test_single_residual_inside_a_branch_is_part_of_the_branch():
    b = Builder()
    x = b.input(*SHAPE)
    h = b.linear(x)
    mixed = b.call(
        operator.add, b.call(torch.cumsum, h, 1), b.call(operator.mul, h, b.parameter(4))
    )
    root = b.call(operator.add, x, b.linear(mixed))
    found = find_residuals(b.output(root))
    assert [site.root for site in found.sites] == [root]
    assert [(entry.root, entry.clause) for entry in found.rejected] == [(mixed, "nested")]
    assert f"'{root.name}'" in found.rejected[0].reason


def test_single_layer_inside_a_branch_is_kept_and_marked():
    b = Builder()
    x = b.input(*SHAPE)
    h = b.linear(x)
    h = b.call(operator.add, h, b.call(operator.mul, ffn(b, h), b.parameter(4)))
    found = find_residuals(b.output(b.call(operator.add, x, b.linear(h))))
    assert ["nested" in site.traits for site in found.sites] == [True, False]
    assert found.trunks == ((0,), (1,))


@pytest.mark.parametrize("projected", [False, True])
def test_queries_added_to_what_an_attention_makes_of_them_are_part_of_the_branch(projected):
    b = Builder()
    x = b.input(*SHAPE)
    query, key, value = (b.linear(x) for _ in range(3))
    scores = b.call(torch.matmul, query, b.method("transpose", key, 1, 2))
    pooled = b.call(torch.matmul, b.call(torch.softmax, scores, -1), value)
    pooled = b.linear(pooled) if projected else pooled
    inner = b.call(operator.add, pooled, query)
    root = b.call(operator.add, x, b.linear(inner))
    found = find_residuals(b.output(root))
    assert [site.root for site in found.sites] == [root]
    assert [(entry.root, entry.clause) for entry in found.rejected] == [(inner, "nested")]


def test_whole_trunk_inside_a_branch_is_kept_and_marked():
    b = Builder()
    x = b.input(*SHAPE)
    h = b.linear(x)
    for _ in range(2):
        h = b.call(operator.add, h, ffn(b, h))
    root = b.call(operator.add, x, b.linear(h))
    found = find_residuals(b.output(root))
    assert ["nested" in site.traits for site in found.sites] == [True, True, False]
    assert found.trunks == ((0, 1), (2,))


def shared_bias_net(layers):
    """Attention layers whose scores all get one bias of full shape, as with a batch of one."""
    b = Builder()
    x, bias = b.input(1, 6, 6), b.input(1, 6, 6)
    for _ in range(layers):
        scores = b.call(torch.matmul, b.linear(x), b.method("transpose", b.linear(x), 1, 2))
        weights = b.call(torch.softmax, b.call(operator.iadd, scores, bias), -1)
        x = b.call(operator.add, x, b.linear(b.call(torch.matmul, weights, x)))
        x = b.call(operator.add, x, ffn(b, x))
    return b.output(x)


def test_bias_shared_by_all_layers_is_injected_into_branches():
    found = find_residuals(shared_bias_net(4))
    assert [len(trunk) for trunk in found.trunks] == [8]
    assert [entry.clause for entry in found.rejected] == ["origin", *["injected"] * 3]
    assert all("nested" not in site.traits for site in found.sites)


def test_attention_of_n_heads_of_width_n_is_no_stream_mixing():
    b = Builder()
    heads = 4
    x = b.input(2, 6, heads * heads)
    query, key, value = (
        b.method("permute", b.method("view", b.linear(x), 2, 6, heads, heads), 0, 2, 1, 3)
        for _ in range(3)
    )
    # 4 tokens are read, so that the keys are square as a mixing matrix is
    key = b.method("transpose", b.method("narrow", key, 2, 0, heads), -2, -1)
    scores = b.call(torch.matmul, query, key)
    biased = b.call(operator.add, b.call(operator.mul, scores, 0.5), b.parameter(heads, 6, heads))
    weights = b.method("softmax", biased, -1)
    out = b.call(torch.matmul, weights, b.method("narrow", value, 2, 0, heads))
    out = b.method("reshape", b.method("permute", out, 0, 2, 1, 3), 2, 6, heads * heads)
    found = find_residuals(b.output(b.call(operator.add, x, b.linear(out))))
    assert len(found.sites) == 1
    assert "already hyper-connected" not in {entry.clause for entry in found.rejected}


def test_model_that_mixes_streams_of_its_own_is_refused():
    b = Builder()
    n, width = 3, 4
    streams = b.input(2, 6, n, width)
    flat = b.method("flatten", streams, 2)
    folded = b.call(F.linear, flat, b.parameter(n * n, n * width))
    matrix = b.call(torch.softmax, b.method("view", folded, 2, 6, n, n), -1)
    x = b.call(operator.getitem, streams, (slice(None), slice(None), 0))
    y = b.call(operator.add, x, ffn(b, x))
    gated = b.call(operator.mul, b.method("unsqueeze", ffn(b, y), 2), b.parameter(n, 1))
    merge = b.call(operator.add, gated, b.call(torch.matmul, matrix, streams))
    found = find_residuals(b.output(merge))
    assert found.sites == ()
    assert {(entry.root, entry.clause) for entry in found.rejected} == {
        (y, "already hyper-connected"),
        (merge, "already hyper-connected"),
    }


def test_attention_over_few_tokens_is_no_stream_mixing():
    b = Builder()
    x = b.input(2, 4, 4)
    scores = b.call(torch.matmul, b.linear(x), b.method("transpose", b.linear(x), 1, 2))
    mixed = b.call(torch.matmul, b.call(torch.softmax, scores, -1), x)
    only_site(b.output(b.call(operator.add, x, mixed)))


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
