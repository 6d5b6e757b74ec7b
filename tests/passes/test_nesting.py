"""Sites inside the branches of others: layers are kept, parts of a branch are not."""

import operator

import pytest
import torch

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder
from tests.passes.residual_graphs import SHAPE, ffn


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
