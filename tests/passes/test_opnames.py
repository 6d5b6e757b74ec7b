import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from mhc_compile.passes.opnames import is_in_place, op_name, raw_name


def call(target, *args, **kwargs):
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    if isinstance(target, str):
        return graph.call_method(target, (x, y, *args), kwargs)
    return graph.call_function(target, (x, y, *args), kwargs)


@pytest.mark.parametrize(
    "target",
    [
        *(operator.add, operator.iadd, torch.add, "add", "add_"),
        *(torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.add),
    ],
)
def test_every_spelling_of_an_add_has_one_name(target):
    assert op_name(call(target)) == "add"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (F.max_pool2d, "max_pool2d"),
        (F.adaptive_max_pool1d, "adaptive_max_pool1d"),
        (torch.conv2d, "conv2d"),
        (F.linear, "linear"),
        (operator.truediv, "div"),
        (torch.concat, "cat"),
        ("swapaxes", "transpose"),
        (torch.ops.mkldnn._linear_pointwise.default, "mkldnn._linear_pointwise"),
        (torch.ops.higher_order.flex_attention, "higher_order.flex_attention"),
    ],
)
def test_spellings_dynamo_and_export_use_are_known(target, name):
    assert op_name(call(target)) == name


def test_getattr_is_named_after_the_attribute_it_reads():
    graph = Graph()
    node = graph.call_function(getattr, (graph.placeholder("x"), "mT"))
    assert op_name(node) == "mT"


def test_nodes_that_call_nothing_have_no_name():
    graph = Graph()
    assert raw_name(graph.placeholder("x")) == ""
    assert raw_name(graph.output(None)) == ""


def test_called_module_is_named_as_such():
    assert raw_name(Graph().call_module("block")) == "call_module"


@pytest.mark.parametrize("target", [operator.iadd, "add_", torch.relu_, torch.ops.aten.add_.Tensor])
def test_in_place_spellings_are_seen(target):
    assert is_in_place(call(target))


def test_inplace_keyword_is_seen():
    assert is_in_place(call(F.dropout, inplace=True))
    assert not is_in_place(call(F.dropout, inplace=False))


@pytest.mark.parametrize(
    "target", [operator.add, operator.and_, operator.or_, "__and__", torch.relu]
)
def test_operators_named_around_a_keyword_are_not_in_place(target):
    assert not is_in_place(call(target))
