import pytest
import torch
from torch import nn

from mhc_compile.passes.annotate import annotate_values
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import dims, value_of
from tests.passes.programs import Branch
from tests.passes.rewriting import exported, traced, widen


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g, self.norm = Branch(), Branch(), nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(x + self.f(x))
        return (x + self.g(x).mean(1, keepdim=True),)


@pytest.mark.parametrize("trace", [traced, exported])
def test_new_nodes_get_the_values_that_captured_ones_have(trace):
    t = trace(Net(), torch.randn(2, 3, 8))
    widen(t)
    key = "val" if trace is exported else "example_value"
    known = {n.name: n.meta[key] for n in t.gm.graph.nodes if key in n.meta}
    annotate_values(t.gm)
    for node in t.gm.graph.nodes:
        if node.op.startswith("call"):
            assert key in node.meta, node
    assert all(n.meta[key] is known[n.name] for n in t.gm.graph.nodes if n.name in known)
    shapes = {op_name(n): dims(n) for n in t.gm.graph.nodes}
    assert shapes["mhc.expand"] == shapes["mhc.post"] == (2, 3, 3, 8)
    assert shapes["mhc.collapse"] == (2, 3, 8)
    (pre, *_) = (n for n in t.gm.graph.nodes if op_name(n) == "mhc.pre")
    assert [tuple(v.shape) for v in value_of(pre)][:3] == [(2, 3, 8), (2, 3, 3), (2, 3, 3, 3)]


def test_sizes_that_vary_stay_symbolic():
    x = torch.randn(4, 5, 8)
    torch._dynamo.mark_dynamic(x, 0)
    t = traced(Net(), x, dynamic=None)
    widen(t)
    annotate_values(t.gm)
    (expand,) = (n for n in t.gm.graph.nodes if op_name(n) == "mhc.expand")
    batch, *rest = dims(expand)
    assert not isinstance(batch, int)
    assert rest == [5, 3, 8]


def test_a_graph_without_fake_values_is_left_alone():
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
    annotate_values(torch.fx.GraphModule(nn.Module(), graph))
    assert all(node.meta == {} for node in graph.nodes)
