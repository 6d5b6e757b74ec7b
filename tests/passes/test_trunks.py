import operator

import torch
import torch.nn.functional as F

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.trunks import branch_nodes
from tests.passes.graphs import Builder

SHAPE = (2, 6, 4)


def residual(b, x, y=None):
    """x + f(y), with y = x if not given."""
    f = b.linear(b.call(torch.relu, b.linear(x if y is None else y)))
    return b.call(operator.add, x, f)


def rms_norm(b, x):
    square = b.method("mean", b.method("pow", x, 2), -1, keepdim=True)
    scale = b.call(torch.rsqrt, b.call(operator.add, square, 1e-6))
    return b.call(operator.mul, b.parameter(4), b.call(operator.mul, x, scale))


def test_pre_norm_sites_chain_root_to_origin():
    b = Builder()
    x = b.input(*SHAPE)
    for _ in range(3):
        x = residual(b, x, b.call(F.layer_norm, x, (4,)))
    found = find_residuals(b.output(b.call(F.layer_norm, x, (4,))))
    assert found.trunks == ((0, 1, 2),)
    assert [(link.site, link.previous, link.region) for link in found.links] == [
        (0, None, ()),
        (1, 0, ()),
        (2, 1, ()),
    ]
    assert all("post-norm" not in site.traits for site in found.sites)


def test_post_norm_lies_in_the_region_of_the_next_link():
    b = Builder()
    x = b.input(*SHAPE)
    norms = []
    for _ in range(3):
        x = b.call(F.layer_norm, residual(b, x), (4,))
        norms.append(x)
    found = find_residuals(b.output(x))
    assert [link.region for link in found.links] == [(), (norms[0],), (norms[1],)]
    assert [site.origin for site in found.sites[1:]] == norms[:2]
    assert all("post-norm" in site.traits for site in found.sites)


def test_written_out_norm_on_the_trunk_is_one_region():
    b = Builder()
    x = b.input(*SHAPE)
    first = residual(b, x)
    normed = rms_norm(b, first)
    found = find_residuals(b.output(residual(b, normed)))
    assert found.trunks == ((0, 1),)
    region = found.links[1].region
    assert region[-1] is normed
    assert len(region) == 6
    assert found.sites[0].traits == ("post-norm",)


def test_norm_that_subtracts_the_mean_twice_is_one_region():
    b = Builder()
    first = residual(b, b.input(*SHAPE))
    mean = b.method("mean", first, -1, keepdim=True)
    square = b.method("pow", b.call(operator.sub, first, mean), 2)
    deviation = b.call(torch.sqrt, b.method("mean", square, -1, keepdim=True))
    normed = b.call(operator.truediv, b.call(operator.sub, first, mean), deviation)
    found = find_residuals(b.output(residual(b, normed)))
    assert found.trunks == ((0, 1),)
    assert found.links[1].region[-1] is normed
    assert len(found.links[1].region) == 7


def test_gate_computed_by_a_layer_ends_a_trunk():
    b = Builder()
    first = residual(b, b.input(*SHAPE))
    gate = b.call(torch.sigmoid, b.linear(b.method("mean", first, 1, keepdim=True)))
    gated = b.call(operator.mul, first, gate)
    found = find_residuals(b.output(residual(b, gated)))
    assert found.trunks == ((0,), (1,))


def test_activation_scale_layout_and_position_on_the_trunk_do_not_end_it():
    b = Builder()
    x = residual(b, b.input(*SHAPE))
    x = b.call(operator.truediv, b.call(torch.relu, x), 1.4)
    x = b.call(operator.add, x, b.parameter(6, 4))
    x = b.method("reshape", x, 12, 4)
    found = find_residuals(b.output(residual(b, x)))
    assert found.trunks == ((0, 1),)
    assert len(found.links[1].region) == 4


def test_linear_cat_slice_and_pool_end_a_trunk():
    enders = (
        lambda b, x: b.linear(x),
        lambda b, x: b.call(torch.cat, [x, x], 1),
        lambda b, x: b.call(operator.getitem, x, (slice(None), slice(0, 3))),
        lambda b, x: b.call(F.max_pool1d, x, 2),
        lambda b, x: b.call(operator.getitem, b.method("chunk", x, 2, 1), 0),
        lambda b, x: b.method("mean", x, 1, keepdim=True),
    )
    for end in enders:
        b = Builder()
        x = residual(b, residual(b, b.input(*SHAPE)))
        y = end(b, x)
        found = find_residuals(b.output(residual(b, residual(b, y, b.call(torch.sin, y)))))
        width = y.meta["example_value"].shape[-1]
        assert width in (2, 4)
        assert found.trunks == ((0, 1), (2, 3)), end


def test_projection_site_starts_a_trunk():
    b = Builder()
    x = residual(b, b.input(*SHAPE))
    f = b.linear(b.call(torch.relu, b.linear(x)))
    x = b.call(operator.add, f, b.linear(x))
    found = find_residuals(b.output(residual(b, x)))
    assert [site.form for site in found.sites] == ["identity", "projection", "identity"]
    assert found.trunks == ((0,), (1, 2))


def test_trunk_of_a_decoder_that_starts_from_zeros_is_not_cut():
    b = Builder()
    memory = b.input(*SHAPE)
    x = residual(b, b.call(torch.zeros_like, memory))
    x = b.call(F.layer_norm, x, (4,))
    cross = b.call(F.scaled_dot_product_attention, x, memory, memory)
    found = find_residuals(b.output(b.call(operator.add, x, cross)))
    assert found.trunks == ((0, 1),)


def test_residual_around_a_trunk_continues_the_outer_one():
    b = Builder()
    x = residual(b, residual(b, b.input(*SHAPE)))
    inner = residual(b, residual(b, x))
    outer = b.call(operator.add, x, b.linear(inner))
    found = find_residuals(b.output(residual(b, outer)))
    assert found.trunks == ((0, 1, 4, 5), (2, 3))


def test_two_heads_on_one_trunk_continue_it_once():
    b = Builder()
    x = residual(b, b.input(*SHAPE))
    found = find_residuals(b.output(residual(b, x), residual(b, x)))
    assert found.trunks == ((0, 1), (2,))


def test_branch_nodes_are_those_between_origin_and_branch():
    b = Builder()
    x, memory = b.input(*SHAPE), b.input(*SHAPE)
    keys = b.linear(memory)
    query = b.linear(x)
    f = b.call(F.scaled_dot_product_attention, query, keys, memory)
    graph = b.output(b.call(operator.add, x, f), b.call(torch.sin, x))
    (site,) = find_residuals(graph).sites
    assert branch_nodes(FlowIndex(graph), site) == (query, f)


def test_a_mask_that_no_site_has_a_part_in_stays_on_the_trunk():
    b = Builder()
    x, mask = b.input(*SHAPE), b.input(2, 6, 1)
    masked = b.call(operator.mul, residual(b, x), mask)
    found = find_residuals(b.output(residual(b, masked)))
    assert found.trunks == ((0, 1),)
    assert found.links[1].region == (masked,)


def test_a_gate_that_another_trunk_makes_ends_a_trunk():
    b = Builder()
    other = residual(b, b.input(*SHAPE))
    gate = b.method("mean", other, -1, keepdim=True)
    gated = b.call(operator.mul, residual(b, b.input(*SHAPE)), gate)
    found = find_residuals(b.output(residual(b, gated)))
    assert [len(trunk) for trunk in found.trunks] == [1, 1, 1]
