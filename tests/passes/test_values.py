import operator

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mhc_compile.passes.values import (
    carries_float,
    describe,
    dims,
    is_float_tensor,
    is_state,
    is_tensor,
    numel,
    rank,
    source_line,
    value_of,
)
from tests.passes.graphs import Builder, capture


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))
        self.plain = torch.ones(4)

    def forward(self, x, y):
        return x * self.weight + y + self.shift + self.plain


def test_parameters_buffers_and_plain_attributes_of_a_module_are_state_and_inputs_are_not():
    graph = capture(Keeper(), torch.ones(2, 4), torch.ones(2, 4))
    states = [is_state(node) for node in graph.nodes if node.op == "placeholder"]
    assert sorted(states) == [False, False, True, True, True]


def test_attributes_of_exported_graphs_are_state_with_a_value():
    program = torch.export.export(Keeper(), (torch.ones(2, 4), torch.ones(2, 4)))
    nodes = [node for node in program.module().graph.nodes if node.op == "get_attr"]
    assert len(nodes) >= 2
    assert all(is_state(node) and dims(node) == (4,) for node in nodes)


def test_attribute_without_metadata_is_looked_up_on_the_owning_module():
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(3))
    builder = Builder()
    node = builder.graph.get_attr("weight")
    builder.graph.output(node)
    assert value_of(node) is None
    gm = GraphModule(root, builder.graph)
    assert dims(next(iter(gm.graph.nodes))) == (3,)


def test_floats_integers_and_tuples_are_told_apart():
    builder = Builder()
    x = builder.input(2, 6)
    ids = builder.input(2, dtype=torch.int64)
    parts = builder.method("chunk", x, 2, -1)
    spectrum = builder.call(torch.fft.fft, x)
    assert is_float_tensor(x)
    assert is_float_tensor(spectrum)
    assert is_tensor(ids)
    assert not carries_float(ids)
    assert carries_float(parts)
    assert not is_tensor(parts)
    assert (dims(x), rank(x), numel(x)) == ((2, 6), 2, 12)
    assert dims(parts) == ()


def test_symbolic_sizes_compare_without_adding_a_guard():
    env = ShapeEnv()
    mode = torch._subclasses.FakeTensorMode(shape_env=env)
    from torch._dynamo.source import ConstantSource

    fake = mode.from_tensor(
        torch.ones(3, 5),
        source=ConstantSource("x"),
        symbolic_context=torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
            dynamic_sizes=[torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC] * 2
        ),
    )
    builder = Builder()
    x = builder.input(1)
    x.meta["example_value"] = fake
    y = builder.input(1)
    y.meta["example_value"] = fake.t()
    flat = builder.input(1)
    flat.meta["example_value"] = fake.reshape(-1)
    guards = len(env.guards)
    assert dims(x) != dims(y)
    assert dims(x) == tuple(reversed(dims(y)))
    assert numel(x) == numel(y) == numel(flat)
    assert len(env.guards) == guards


def test_source_line_is_the_innermost_frame_and_empty_if_unknown():
    builder = Builder()
    x = builder.input(2)
    y = builder.call(operator.add, x, x)
    assert source_line(y) == ""
    assert describe(y) == "'add'"
    y.meta["stack_trace"] = (
        'File "/a/outer.py", line 3, in forward\n  z = f(x)\nFile "/b/inner.py", line 12, in f\n'
    )
    assert source_line(y) == "inner.py:12"
    assert describe(y) == "'add' (inner.py:12)"
