import heapq
import operator

import torch
from torch import nn

from mhc_compile.passes.residuals import find_residuals
from tests.passes.graphs import Builder, capture

SHAPE = (2, 6, 4)


def ffn(b, x):
    return b.linear(b.call(torch.relu, b.linear(x)))


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        x += self.down(self.up(self.norm(x)))
        return x


def test_dynamo_and_export_graphs_of_one_module_give_the_same_sites():
    net = nn.Sequential(*(Block() for _ in range(3))).eval()
    x = torch.ones(2, 5, 8)
    captured = find_residuals(capture(net, x))
    exported = find_residuals(torch.export.export(net, (x,)).module().graph)
    assert [site.traits for site in captured.sites] == [("dropout",), ("in place",)] * 3
    assert [len(found.sites) for found in (captured, exported)] == [6, 6]
    assert captured.trunks == exported.trunks == ((0, 1, 2, 3, 4, 5),)


def test_training_graph_has_the_sites_of_the_evaluation_graph():
    net = nn.Sequential(*(Block() for _ in range(2)))
    x = torch.ones(2, 5, 8)
    found = [find_residuals(capture(net.train(mode), x)) for mode in (True, False)]
    assert found[0].trunks == found[1].trunks == ((0, 1, 2, 3),)


def test_work_grows_linearly_with_the_graph(monkeypatch):
    def visits(layers):
        b = Builder()
        x = b.input(*SHAPE)
        for _ in range(layers):
            x = b.call(operator.add, x, ffn(b, x))
            x = b.call(operator.add, x, b.parameter(6, 4))
        graph = b.output(x)
        count = 0
        pop = heapq.heappop

        def counted(heap):
            nonlocal count
            count += 1
            return pop(heap)

        monkeypatch.setattr(heapq, "heappop", counted)
        find_residuals(graph)
        monkeypatch.setattr(heapq, "heappop", pop)
        return count

    assert visits(40) == 4 * visits(10)
