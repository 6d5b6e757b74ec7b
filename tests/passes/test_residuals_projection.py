"""Clause 8: skips that are no copy of the origin (projections, slices, joined values)."""

import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder
from tests.passes.residual_graphs import SHAPE, ffn, only_rejection, only_site


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


def test_sum_of_two_linear_branches_is_rejected():
    b = Builder()
    x = b.input(2, 4, 8, 8)
    f, skip = projection_block(b, x, bent=False)
    rejected = only_rejection(b.output(b.call(operator.add, f, skip)))
    assert rejected.clause == "linear branches"
    assert "linear" in rejected.reason


def joined_sum(b, *, all_parts=True):
    """``cat([token, patches]) + cat([g, f])``; f and g come from both, or from the token alone."""
    x = b.input(*SHAPE)
    token = b.method("unsqueeze", b.call(operator.getitem, x, (slice(None), 0)), 1)
    patches = b.input(2, 5, 4)
    read = (
        b.call(torch.cat, [token, patches], 1) if all_parts else b.method("repeat", token, 1, 6, 1)
    )
    scores = b.call(torch.matmul, b.linear(read), b.method("transpose", b.linear(read), 1, 2))
    mixed = ffn(b, b.call(torch.matmul, scores, read))
    mean = b.method("mean", b.call(operator.getitem, mixed, (slice(None), slice(0, 1))), 1, True)
    rest = b.call(operator.getitem, mixed, (slice(None), slice(1, None)))
    skip = b.call(torch.cat, [token, patches], 1)
    return skip, patches, b.call(operator.add, skip, b.call(torch.cat, [mean, rest], 1))


def test_a_skip_may_join_several_values_that_the_branch_comes_from():
    b = Builder()
    skip, patches, root = joined_sum(b)
    site = only_site(b.output(root))
    assert (site.form, site.skip, site.origin) == ("joined", skip, patches)


def test_a_skip_that_joins_a_value_which_the_branch_does_not_read_is_none():
    b = Builder()
    _, _, root = joined_sum(b, all_parts=False)
    assert only_rejection(b.output(root)).clause == "origin"


def activated(b, x, convolutions):
    """So many times norm, activation and convolution."""
    norm = b.parameter(4)
    for _ in range(convolutions):
        x = b.call(torch.relu, b.call(F.batch_norm, x, norm, norm, norm, norm, True))
        x = b.call(torch.conv2d, x, b.parameter(4, 4, 1, 1))
    return x


def test_a_shortcut_may_start_with_a_norm_and_an_activation_of_its_own():
    b = Builder()
    x = b.input(2, 4, 8, 8)
    skip = activated(b, x, 1)
    site = only_site(b.output(b.call(operator.add, skip, activated(b, x, 3))))
    assert (site.form, site.skip, site.origin) == ("projection", skip, x)


@pytest.mark.parametrize("convolutions", [1, 2])
def test_of_branches_that_mix_equally_often_none_is_a_shortcut(convolutions):
    b = Builder()
    x = b.input(2, 4, 8, 8)
    left, right = (activated(b, x, convolutions) for _ in range(2))
    assert only_rejection(b.output(b.call(operator.add, left, right))).clause == "origin"
