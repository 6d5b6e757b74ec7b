import torch
from torch import nn

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.owners import ROOT, ModuleCall, module_calls
from tests.passes.rewriting import exported, traced


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """A block of its own, one that is called twice, and one that has two names."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.named = Block(), Block(), Block()
        self.alias = self.named

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)))
        return self.alias(self.named(x)) + 1.0


def calls_of_adds(t):
    return [module_calls(node) for node in t.gm.graph.nodes if op_name(node) == "add"]


def check(calls, identity):
    first, twice, again, named, alias, root = calls
    assert root == (ROOT,)
    assert all(call[0] == ROOT and len(call) == 2 for call in calls[:-1])
    modules = [call[-1].module for call in calls[:-1]]
    assert modules == [identity("first"), *[identity("twice")] * 2, *[identity("named")] * 2]
    assert len({call[-1].call for call in calls[:-1]}) == 5
    assert first != twice != again != named != alias


def test_dynamo_calls_are_told_apart_by_module_and_count():
    net = Net()
    calls = calls_of_adds(traced(net, torch.randn(2, 4)))
    check(calls, lambda name: str(id(getattr(net, name))))


def test_exported_calls_are_told_apart_by_path_and_count():
    calls = calls_of_adds(exported(Net(), torch.randn(2, 4)))
    first, twice, again, *_, root = calls
    assert root == (ROOT,)
    assert [call[-1].module for call in (first, twice, again)] == ["first", "twice", "twice"]
    assert twice[-1].call != again[-1].call


def test_operations_of_one_call_agree_on_it():
    t = traced(nn.Sequential(Block(), Block()), torch.randn(2, 4))
    tanh, add = (
        [module_calls(n)[-1] for n in t.gm.graph.nodes if op_name(n) == name]
        for name in ("tanh", "add")
    )
    assert tanh == add
    assert len(set(add)) == 2


def test_an_operation_without_a_module_belongs_to_the_frame():
    node = torch.fx.Graph().placeholder("x")
    assert module_calls(node) == (ROOT,) == (ModuleCall("", ""),)
