"""Equal slices of one value become one node."""

import operator

import pytest
import torch
from torch import nn

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.slices import merge_equal_slices
from tests.passes.graphs import Builder
from tests.passes.rewriting import assert_same, exported, traced

PATCHES = (slice(None), slice(1, None))


class PatchesOnly(nn.Module):
    """Adds a layer to all tokens but the first, which it reads with a slice of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x[:, 1:] + torch.relu(self.linear(x[:, 1:]))


@pytest.mark.parametrize("capture", [traced, exported])
def test_a_residual_around_a_part_of_a_tensor_starts_from_one_slice(capture):
    t = capture(PatchesOnly(), torch.randn(2, 3, 4))
    outputs, gradients = t.run(), t.gradients()
    before = [op_name(node) for node in t.gm.graph.nodes]
    assert merge_equal_slices(t.gm.graph)
    t.gm.graph.lint()
    t.gm.recompile()
    after = [op_name(node) for node in t.gm.graph.nodes]
    assert sum(name in ("getitem", "slice") for name in before) > 1
    assert sum(name in ("getitem", "slice") for name in after) < len(before)
    assert_same(t.run(), outputs, 0)
    assert_same(t.gradients(), gradients, 1e-6)
    (site,) = find_residuals(t.gm.graph).sites
    assert (site.form, site.origin) == ("identity", site.skip)
    assert not merge_equal_slices(t.gm.graph)


def test_other_slices_and_slices_of_other_values_stay():
    b = Builder()
    x, y = b.input(2, 3, 4), b.input(2, 3, 4)
    parts = [
        b.call(operator.getitem, x, PATCHES),
        b.call(operator.getitem, x, (slice(None), slice(1, 2))),
        b.call(operator.getitem, y, PATCHES),
        b.method("narrow", x, 1, 1, 2),
    ]
    graph = b.output(*parts)
    assert not merge_equal_slices(graph)


def test_slices_on_both_sides_of_a_write_stay():
    b = Builder()
    x = b.call(torch.relu, b.input(2, 3, 4))
    before = b.call(operator.getitem, x, PATCHES)
    copy = b.call(torch.clone, before)
    b.call(operator.iadd, x, b.input(2, 3, 4))
    after = b.call(operator.getitem, x, PATCHES)
    assert not merge_equal_slices(b.output(copy, after))


def test_an_index_that_is_a_tensor_is_no_slice():
    b = Builder()
    x, index = b.input(2, 2), b.call(torch.arange, 2)
    parts = [b.call(operator.getitem, x, index) for _ in range(2)]
    assert not merge_equal_slices(b.output(*parts))
