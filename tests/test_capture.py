"""What a capture sees of a model that Dynamo cuts into several graphs."""

import torch
from torch import nn

import mhc_compile


class _Layer(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(8, 8), activation(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.activation(self.up(x)))


class _Last(_Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.activation(self.up(x)))


class _Eager(nn.Module):
    """Runs its layers one by one outside of Dynamo: each is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(nn.Tanh), _Layer(nn.Tanh), _Last(nn.Tanh)])

    @torch.compiler.disable(recursive=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_no_streams_pass_through_a_graph_that_runs_for_a_second_module() -> None:
    model, x = _Eager(), torch.randn(3, 8)
    expected = model(x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == ["layers.0.add0", "layers.2.add0"]
    assert [trunk.sites for trunk in report.trunks] == [("layers.0.add0",), ("layers.2.add0",)]
    assert any("ran 2 times for several modules" in note for note in report.notes)

    actual = torch.compile(model, backend="mhc", options={"inner": "aot_eager"})(x)
    torch.testing.assert_close(actual, expected)
