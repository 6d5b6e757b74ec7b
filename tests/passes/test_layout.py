import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.axes import axis_order
from mhc_compile.passes.layout import channel_axis
from tests.passes.graphs import Builder

aten = torch.ops.aten


def axis(shape, build):
    """The channel axis of an input of ``shape`` whose branch ``build(b, x)`` makes."""
    b = Builder()
    x = b.input(*shape)
    b.output(build(b, x))
    return channel_axis(x, {node for node in b.graph.nodes if node.op.startswith("call")})


def conv(b, x, width=6):
    return b.call(torch.conv2d, x, b.parameter(width, width, 1, 1))


@pytest.mark.parametrize(
    ("shape", "build", "expected"),
    [
        ((2, 4, 6), lambda b, x: b.linear(x), -1),
        ((2, 6, 4, 5), conv, -3),
        ((2, 6, 4), lambda b, x: b.call(torch.conv1d, x, b.parameter(6, 6, 1)), -2),
        ((2, 4, 5, 6), lambda b, x: b.linear(x), -1),
        ((2, 6, 4), lambda b, x: b.call(F.group_norm, x, 2), -2),
        ((2, 4, 6), lambda b, x: b.call(F.layer_norm, input=x, normalized_shape=(6,)), -1),
        ((2, 6, 4, 5), lambda b, x: b.call(aten.convolution.default, x, b.parameter(6, 6, 1, 1),
            None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), -3),
    ],
)  # fmt: skip
def test_the_first_operation_that_cares_decides(shape, build, expected):
    assert axis(shape, build) == expected


@pytest.mark.parametrize(
    ("shape", "expected"), [((6,), -1), ((2, 6), -1), ((2, 4, 6), -1), ((2, 6, 4, 5), -3)]
)
def test_without_evidence_images_have_their_channels_second(shape, expected):
    assert axis(shape, lambda b, x: b.call(torch.tanh, x)) == expected
    assert axis((2, 6, 3, 4, 5), lambda b, x: b.call(torch.tanh, x)) == -4


def test_permutations_on_the_way_are_followed():
    def build(b, x):
        return b.linear(b.call(torch.tanh, b.method("permute", x, 0, 2, 3, 1)))

    assert axis((2, 6, 4, 5), build) == -3
    assert axis((2, 6, 4), lambda b, x: b.linear(b.method("transpose", x, 1, 2))) == -2
    assert axis((2, 6, 4), lambda b, x: b.linear(b.call(torch.transpose, x, dim0=1, dim1=2))) == -2
    assert axis((2, 4, 5, 6), lambda b, x: conv(b, b.method("movedim", x, -1, 1))) == -1


def test_what_makes_the_value_decides_first():
    b = Builder()
    x = b.linear(b.input(2, 6, 4, 5))
    b.output(b.call(torch.conv2d, x, b.parameter(6, 6, 1, 1)))
    assert channel_axis(x, set(b.graph.nodes)) == -1


def test_readers_outside_the_branch_are_not_asked():
    b = Builder()
    x = b.input(2, 6, 4, 5)
    branch = conv(b, x)
    b.output(b.linear(x), branch)
    assert channel_axis(x, {branch}) == -3


def test_an_operand_that_is_no_features_is_no_evidence():
    b = Builder()
    weight = b.input(6, 4)
    product = b.call(torch.matmul, b.input(2, 6), weight)
    b.output(product)
    assert channel_axis(weight, {product}) == -1


@pytest.mark.parametrize(
    ("build", "order"),
    [
        (lambda b, x: b.method("permute", x, 2, 0, 1), (2, 0, 1)),
        (lambda b, x: b.method("permute", x, (-1, 0, 1)), (2, 0, 1)),
        (lambda b, x: b.call(torch.permute, input=x, dims=(0, 2, 1)), (0, 2, 1)),
        (lambda b, x: b.call(torch.swapaxes, x, axis0=0, axis1=-1), (2, 1, 0)),
        (lambda b, x: b.call(torch.moveaxis, x, 0, 2), (1, 2, 0)),
        (lambda b, x: b.call(getattr, x, "mT"), (0, 2, 1)),
        (lambda b, x: b.call(aten.transpose.int, x, 0, 1), (1, 0, 2)),
    ],
)
def test_every_spelling_of_a_permutation_is_read(build, order):
    b = Builder()
    node = build(b, b.input(2, 2, 2))
    assert axis_order(node) == order


def test_other_operations_are_no_permutation():
    b = Builder()
    x = b.input(2, 2)
    assert axis_order(b.method("view", x, 4)) is None
    assert axis_order(b.call(operator.add, x, x)) is None
    assert axis_order(x) is None
