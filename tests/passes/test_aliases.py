import operator

import pytest
import torch
import torch.nn.functional as F

from mhc_compile.passes.aliases import AliasIndex, written_values
from tests.passes.graphs import Builder

aten = torch.ops.aten


def index_of(b, *outputs):
    return AliasIndex(b.output(*outputs))


@pytest.mark.parametrize(
    "view",
    [
        lambda b, x: b.method("view", x, -1),
        lambda b, x: b.call(torch.reshape, input=x, shape=(-1,)),
        lambda b, x: b.call(operator.getitem, x, 0),
        lambda b, x: b.call(getattr, x, "mT"),
        lambda b, x: b.method("contiguous", x),
        lambda b, x: b.method("to", x, torch.float32),
        lambda b, x: b.call(F.dropout, x, 0.0),
        lambda b, x: b.method("detach", x),
        lambda b, x: b.method("cpu", x),
        lambda b, x: b.call(aten.permute.default, x, [1, 0]),
        lambda b, x: b.call(operator.getitem, b.method("chunk", x, 2), 1),
    ],
)
def test_whatever_may_be_a_view_shares_the_storage(view):
    b = Builder()
    x = b.call(torch.neg, b.input(2, 4))
    y = view(b, x)
    index = index_of(b, x, y)
    assert index.base(y) is x


def test_a_new_value_does_not_share_the_storage():
    b = Builder()
    x = b.input(2, 4)
    y = b.call(operator.mul, x, 2)
    assert index_of(b, x, y).base(y) is y


@pytest.mark.parametrize(
    "write",
    [
        lambda b, x: b.call(operator.iadd, x, 1.0),
        lambda b, x: b.method("relu_", x),
        lambda b, x: b.call(torch.relu_, x),
        lambda b, x: b.call(F.relu, input=x, inplace=True),
        lambda b, x: b.call(F.relu, x, True),
        lambda b, x: b.call(aten.add_.Tensor, x, x),
        lambda b, x: b.call(torch.neg, b.input(2, 4), out=x),
        lambda b, x: b.call(aten.neg.out, b.input(2, 4), out=x),
        lambda b, x: b.call(operator.setitem, x, 0, 1.0),
        lambda b, x: b.call(torch._foreach_neg_, [x]),
    ],
)
def test_every_spelling_of_a_write_is_seen(write):
    b = Builder()
    x = b.call(torch.abs, b.input(2, 4))
    y = b.method("view", x, 8)
    node = write(b, x)
    index = index_of(b, x, y)
    assert written_values(node) == (x,)
    assert index.is_written(x)
    assert index.is_written(y)


def test_a_custom_op_writes_what_its_schema_says():
    with torch.library._scoped_library("mhc_test", "FRAGMENT") as library:
        library.define("fill(Tensor a, Tensor(a!) b, *, Tensor(b!) c) -> ()")
        graph = torch.fx.Graph()
        a, b, c = (graph.placeholder(name) for name in "abc")
        node = graph.call_function(torch.ops.mhc_test.fill.default, (a, b), {"c": c})
        assert written_values(node) == (b, c)


def test_reading_is_no_write():
    b = Builder()
    x = b.input(2, 4)
    nodes = [b.call(F.relu, x), b.call(F.relu, x, False), b.call(F.dropout, x, 0.5, True)]
    index = index_of(b, *nodes)
    assert all(written_values(node) == () for node in nodes)
    assert not index.is_written(x)


def test_nobody_observes_a_write_whose_target_is_only_read_before():
    b = Builder()
    x = b.call(torch.neg, b.input(4))
    read = b.call(torch.exp, x)
    write = b.call(operator.iadd, x, read)
    assert index_of(b, write).observer(write) is None


def test_the_written_value_itself_is_no_observer():
    b = Builder()
    x = b.call(torch.neg, b.input(4))
    write = b.call(operator.iadd, x, 1.0)
    later = b.call(torch.exp, x)
    view = b.method("view", write, 2, 2)
    assert index_of(b, later, b.call(torch.exp, view)).observer(write) is None


def test_an_earlier_view_that_is_read_later_observes_the_write():
    b = Builder()
    x = b.call(torch.neg, b.input(4))
    view = b.method("view", x, 2, 2)
    write = b.call(operator.iadd, x, 1.0)
    assert index_of(b, write, b.call(torch.exp, view)).observer(write) is view


def test_the_base_observes_a_write_to_its_view():
    b = Builder()
    x = b.call(torch.neg, b.input(4))
    view = b.method("view", x, 2, 2)
    write = b.method("add_", view, 1.0)
    assert index_of(b, write, x).observer(write) is x


def test_the_caller_observes_a_write_to_an_input():
    b = Builder()
    x = b.input(4)
    write = b.call(operator.iadd, x, 1.0)
    assert index_of(b, write).observer(write) is x
