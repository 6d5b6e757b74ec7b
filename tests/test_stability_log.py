"""Stability while training: what is measured when, what is written, and what stays untouched."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mhc_compile import MHCConfig, cli, convert_
from mhc_compile.backend import mhc
from mhc_compile.errors import ConfigError
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.plots import plot_stability
from mhc_compile.stability import measure
from mhc_compile.stability_log import METRICS, StabilityLog
from tests.mhc_graphs import WIDTH, rewritten_network
from tests.test_recorder import Residual

SPEC = SiteSpec(streams=2)
MODEL = """
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

def build():
    return Residual(), (torch.randn(2, 8),)
"""


class _Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def _converted(constraint: str = "none") -> tuple[nn.Module, torch.Tensor]:
    model, x = Residual(), torch.randn(4, 8)
    convert_(model, x, config=MHCConfig(streams=2, constraint=constraint, inner="eager"))
    return model, x


def test_a_row_and_scalars_for_each_trunk_and_site_every_k_steps(tmp_path: Path) -> None:
    model, x = _converted()
    writer = _Writer()
    log = StabilityLog(model, x, every=2, csv_path=tmp_path / "gains.csv", writer=writer)
    assert [log(step) is not None for step in range(4)] == [True, False, True, False]
    with (tmp_path / "gains.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["kind"], row["name"]) for row in rows] == [
        (step, kind, name)
        for step in ("0", "2")
        for kind, name in (
            ("trunk", "0"), ("site", "layers.0.add0"), ("site", "layers.1.add0"),
            ("site", "layers.2.add0"),
        )
    ]  # fmt: skip
    assert float(rows[0]["forward_gain"]) == log.reports[0][1].trunks[0].composite.forward_gain
    assert len(writer.scalars) == len(rows) * len(METRICS)
    assert ("mhc/trunk/0/spread", log.reports[0][1].trunks[0].spread, 0) in writer.scalars


def test_it_sees_the_parameters_that_are_trained_and_leaves_mode_and_random_state() -> None:
    model, x = _converted()
    model.train()
    log = StabilityLog(model, x, every=1)
    assert model.training
    assert all(module.training for module in model.modules())
    first = log(0)
    step = torch.compile(model, backend=mhc, options={"inner": "eager"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        step(x).square().sum().backward()
        optimizer.step()
    state = torch.get_rng_state()
    second = log(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    assert second is not None
    assert first.trunks[0].composite.forward_gain == pytest.approx(1, abs=1e-5)
    assert abs(second.trunks[0].composite.forward_gain - 1) > 1e-3
    assert second.trunks[0].spread > first.trunks[0].spread


def test_every_has_to_be_a_number_of_steps() -> None:
    model, x = _converted()
    with pytest.raises(ConfigError, match="every=0"):
        StabilityLog(model, x, every=0)


def test_composites_grow_site_by_site_up_to_that_of_the_trunk() -> None:
    model, x = _converted("sinkhorn")
    report = StabilityLog(model, x, every=1)(0)
    assert report is not None
    first, *_, last = report.sites
    assert first.composite == first.mixing
    assert last.composite == report.trunks[0].composite
    assert len(last.mixing.matrix) == 2
    for row in last.mixing.matrix:
        assert sum(row) == pytest.approx(1, abs=1e-5)


def test_pictures_of_one_report_are_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = measure(rewritten_network(SPEC, trunks=(2, 1)), torch.randn(2, 3, WIDTH))
    names = [path.name for path in plot_stability(report, tmp_path / "a")]
    plot_stability(report, tmp_path / "b")
    assert names == [
        f"trunk_{trunk}_{kind}.{suffix}"
        for trunk in (0, 1)
        for kind in ("mixings", "depth")
        for suffix in ("png", "svg")
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_command_shows_gains_and_mixings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cli_stable_model.py"
    path.write_text(MODEL)
    assert cli.main(["stability", f"{path}:build", "--streams", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Residual: 3 sites measured")
    assert "Gains of whole trunks" in shown
    assert "Effective H_res, by rows" in shown
    assert shown.count("  [0.") == 3 * 2
    assert cli.main(["stability", f"{path}:build", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in report["sites"]] == ["add0", "add1", "add2"]


def test_pictures_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = measure(rewritten_network(SPEC), torch.randn(2, 3, WIDTH))
    with pytest.raises(ConfigError, match=r"mhc-compile\[plots\]"):
        plot_stability(report, tmp_path)
