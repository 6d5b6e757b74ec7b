"""Where a widened graph can be cut into stages."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

import mhc_compile
from mhc_compile import MHCConfig
from mhc_compile.passes.cuts import crossing, find_flow, parts_of
from mhc_compile.passes.states import POST
from tests.nets import WIDTH, Block, Net, example

UNJOINED = MHCConfig(skip_passes=("join_seams_pass",))


def widened(model: nn.Module, **options: object) -> GraphModule:
    return mhc_compile.rewrite(model, example(), config=UNJOINED, **options)


def cuts(model: nn.Module) -> list[int]:
    """Numbers of the sites behind which ``model`` can be cut."""
    graph = widened(model).graph
    posts = list(graph.find_nodes(op="call_function", target=POST))
    return [posts.index(cut) for cut in find_flow(graph).cuts]


class Trunk(nn.Module):
    """Four blocks of two sites; subclasses read their values elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)


class LongSkip(Trunk):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](x))
        return self.head(self.blocks[3](torch.relu(kept) * x))


class InputAgain(Trunk):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for block in self.blocks:
            x = block(x)
        return self.head(x) * torch.sigmoid(first)


class Constants(Trunk):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.arange(WIDTH, dtype=x.dtype) / WIDTH
        for block in self.blocks:
            x = block(x)
            x = x + torch.tanh(self.head(x * scale))
        return x * scale


class SharedNoise(Trunk):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(WIDTH)
        for block in self.blocks[:2]:
            x = block(x)
        x = x + self.head(x * noise)
        for block in self.blocks[2:]:
            x = block(x)
        return x * noise


class Statistics(Trunk):
    """Writes a buffer from two places of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        early = x.mean((0, 1))
        x = self.blocks[1](x)
        self.seen.copy_(early + x.mean((0, 1)))
        return self.head(self.blocks[3](self.blocks[2](x)))


class OwnStatistics(Statistics):
    """Writes a buffer from one place of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](x))
        self.seen.add_(x.mean((0, 1)))
        return self.head(self.blocks[3](self.blocks[2](x)))


def test_a_chain_can_be_cut_behind_every_site() -> None:
    assert cuts(Net(3)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (LongSkip, [0, 1, 6, 7]),
        (InputAgain, []),
        (Constants, list(range(12))),
        (SharedNoise, []),
        (Statistics, [0, 1, 4, 5, 6, 7]),
        (OwnStatistics, list(range(8))),
    ],
)
def test_a_cut_is_where_nothing_else_is_alive(model: type[nn.Module], expected: list[int]) -> None:
    assert cuts(model()) == expected


def test_what_keeps_a_place_from_being_a_cut_is_named() -> None:
    graph = widened(InputAgain()).graph
    flow = find_flow(graph)
    post = next(iter(graph.find_nodes(op="call_function", target=POST)))
    assert [node.name for node in crossing(flow, post)] == ["sigmoid"]


def test_a_size_that_is_dynamic_is_a_value_that_crosses() -> None:
    class Reshaping(Trunk):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x.reshape(x.shape[0] * x.shape[1], WIDTH)).reshape(x.shape)
            return x

    fixed = widened(Reshaping()).graph
    shapes = {"x": {0: Dim.DYNAMIC}}
    dynamic = widened(Reshaping(), dynamic_shapes=shapes).graph
    assert len(find_flow(fixed).cuts) == 4
    assert len(find_flow(dynamic).cuts) == 1  # behind the last site no shape is needed any more


def test_parts_are_numbered_along_the_graph_and_effects_stand_in_theirs() -> None:
    graph = widened(OwnStatistics()).graph
    flow = find_flow(graph)
    chosen = [flow.cuts[3], flow.cuts[5]]
    parts = parts_of(graph, flow, chosen)
    assert [parts[cut] for cut in chosen] == [0, 1]
    assert parts[graph.output_node()] == 2
    written = [node for node in parts if "add_" in node.name and node.is_impure()]
    assert [parts[node] for node in written] == [1]
    numbers = list(parts.values())
    assert numbers == sorted(numbers)
