"""Sums that are no residual sites, and the clause that each fails."""

import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder
from tests.passes.residual_graphs import SHAPE, ffn, only_rejection, only_site


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
