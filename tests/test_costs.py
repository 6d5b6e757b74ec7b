"""The costs that a report names, against what the widened network really writes."""

import torch
import torch.nn.functional as F
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig
from mhc_compile.tables import report_text

B, T, C, N = 2, 3, 8, 4
TOKEN = N * C * 4 + (N * N + 2 * N) * 4  # streams for one sum and u, float32; the coefficients


class Net(nn.Module):
    """A scaled skip, a norm and a view between two sites, and a projection at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(C, C) for _ in range(3))
        self.norm, self.project = nn.LayerNorm(C), nn.Linear(C, 2 * C)
        self.wide = nn.Linear(C, 2 * C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 0.5 * x + torch.tanh(self.f(x))
        x = F.relu(self.norm(x).view(-1, C))
        x = x + torch.tanh(self.g(x))
        return self.project(x) + torch.tanh(self.wide(x))


def explain(dynamic: bool = True) -> mhc_compile.Report:
    config = MHCConfig(streams=N, dynamic=dynamic)
    return mhc_compile.explain(Net(), torch.randn(B, T, C), config=config)


def test_a_site_costs_its_streams_its_input_and_its_coefficients() -> None:
    first, second, projected = explain().sites
    assert first.activation_bytes == second.activation_bytes == B * T * TOKEN
    assert projected.activation_bytes == B * T * (TOKEN + N * C * 4)  # twice as wide
    assert first.parameters == 96 * C + 27
    assert projected.parameters == 96 * 2 * C + 27


def test_static_mappings_have_one_set_of_coefficients() -> None:
    assert (
        explain(dynamic=False).sites[0].activation_bytes == B * T * N * C * 4 + (N * N + 2 * N) * 4
    )


def test_operations_on_the_trunk_cost_what_the_further_streams_write() -> None:
    row = B * T * C * 4
    trunk, projected = explain().trunks
    assert [(op.name, op.count, op.extra_bytes) for op in trunk.on_trunk] == [
        ("mul", 1, (N - 1) * row),
        ("layer_norm", 1, (N - 1) * row),
        ("view", 1, 0),
        ("relu", 1, (N - 1) * row),
    ]
    assert projected.on_trunk == ()


def test_the_choice_at_a_projection_is_told_with_its_reason() -> None:
    first, _, projected = explain().sites
    assert first.choice == ""
    assert "projecting every stream would cost n times as much" in projected.choice
    text = report_text(explain())
    assert "layer_norm x1 (+576 B)" in text
    assert "the skip is projected once" in text
