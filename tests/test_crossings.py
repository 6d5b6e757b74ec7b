"""How one value came from another, as autograd tells."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

from mhc_compile._torch_private import OPAQUE, kinds_between
from mhc_compile.crossings import Autograd, _kind_of
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.vocabulary import BENDS, MIXES

W = torch.randn(4, 4, requires_grad=True)


def start() -> torch.Tensor:
    """A value with a history of its own."""
    return torch.randn(2, 4) @ W


class Halve(torch.autograd.Function):
    """A function that autograd does not look into."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / 2


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: x * 2, 0),
        (lambda x: x.transpose(0, 1).contiguous(), 0),
        (lambda x: F.layer_norm(x, (4,)), 0),
        (torch.relu, BENDS),
        (lambda x: x @ W, MIXES),
        (lambda x: F.linear(x, W, W[0]), MIXES),
        (lambda x: torch.relu(x @ W), MIXES | BENDS),
        (lambda x: torch.relu(x) + x @ W, MIXES),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), MIXES | BENDS),
        (lambda x: torch.zeros(3, 4).index_add(0, torch.tensor([0, 2]), x), MIXES),
        (lambda x: F.conv1d(x[None], torch.ones(2, 2, 1)), MIXES),
        (torch.fft.fft, MIXES),
        (Halve.apply, MIXES | BENDS),
        (lambda x: x.clone().mul_(2), 0),
    ],
)
def test_the_best_way_between_two_values_is_told(
    function: Callable[[torch.Tensor], torch.Tensor], kind: int
) -> None:
    x = start()
    assert kinds_between(function(x), x, _kind_of) == kind


@pytest.mark.parametrize(
    "function",
    [
        lambda x: start(),
        lambda x: x.detach() @ W,
        lambda x: torch.randn(2, 4),
        lambda x: x,
        lambda x: W * 2,
    ],
)
def test_no_way_no_answer(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = start()
    assert kinds_between(function(x), x, _kind_of) is None


def test_the_two_outputs_of_one_operation_do_not_come_from_each_other() -> None:
    left, right = start().chunk(2, -1)
    assert kinds_between(left * 2, left, _kind_of) == 0
    assert kinds_between(left * 2, right, _kind_of) is None


def test_only_what_came_after_the_earlier_value_is_looked_at() -> None:
    seen = []

    def kind_of(operation: str | int) -> int:
        seen.append(operation)
        return 0

    x = start()
    for _ in range(50):
        x = torch.tanh(x)
    kinds_between(x * 2, x, kind_of)
    assert seen == ["mul"]


def test_operations_have_the_names_that_graphs_have() -> None:
    seen = set()

    def kind_of(operation: str | int) -> int:
        seen.add(operation)
        return 0

    x = start()
    kinds_between(Halve.apply(F.layer_norm(x, (4,))) @ W, x, kind_of)
    assert seen == {OPAQUE, "native_layer_norm", "mm"}


def test_a_graph_is_asked_again_about_the_values_of_another_call() -> None:
    graph = Graph()
    x, h = graph.placeholder("x"), graph.placeholder("h")
    tree = SumTree(graph.call_function(torch.add, (x, h)), (x, h), ())
    autograd = Autograd(["x", "h"])
    value = start()
    autograd.values = (value, value @ W)
    assert autograd.answers(autograd.values) == ()
    assert autograd.ask(tree, 0, h, x) == MIXES
    assert autograd.answers(autograd.values) == (((1, 0), MIXES),)
    assert autograd.answers((value, start())) == (((1, 0), None),)
    assert autograd.answers((value, 3)) == (((1, 0), None),)
