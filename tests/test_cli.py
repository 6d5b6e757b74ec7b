"""Exit statuses, and what goes to standard output and standard error."""

import json
from pathlib import Path
from typing import Any

import pytest

from mhc_compile import cli
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.report import Report
from tests.reports import example_report

TOY = """
import torch

def build(width=8):
    return torch.nn.Linear(width, width), (torch.randn(2, width),)
"""

RESIDUAL = """
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

def build():
    return Residual(), (torch.randn(2, 8),)
"""


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "cli_toy_model.py"
    path.write_text(TOY)
    return f"{path}:build"


class _Explain:
    """Stands for `mhc_compile.explain` where a test is about the command line alone."""

    def __init__(self, result: Report | Exception) -> None:
        self.result = result
        self.config: MHCConfig | None = None
        self.width = 0

    def __call__(self, model: Any, *args: Any, config: MHCConfig, **kwargs: Any) -> Report:
        self.config, self.width = config, model.in_features
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch) -> _Explain:
    fake = _Explain(example_report())
    monkeypatch.setattr(cli, "explain", fake)
    return fake


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("explain", "dump", "verify", "kernels"))


@pytest.mark.parametrize(
    "argv", [[], ["explian", "hf:gpt2"], ["explain"], ["dump", "x", "--streams", "many"]]
)
def test_wrong_arguments_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streams", "0"], "streams=0 is not allowed"),
        (["--constraint", "sinkorn"], "constraint='sinkorn' is not allowed: use one of sinkhorn"),
        (["--set", "width"], "--set 'width' is not key=value"),
    ],
)
def test_a_bad_value_is_one_line_on_stderr_and_exits_with_2(
    toy: str, flags: list[str], message: str, explain: _Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", toy, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_an_unsupported_model_exits_with_1(
    toy: str, explain: _Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    explain.result = UnsupportedGraphError("the trunk\n  is aliased at model.py:3")
    assert cli.main(["explain", toy]) == 1
    assert capsys.readouterr().err == "error: the trunk is aliased at model.py:3\n"


def test_debug_lets_the_error_through(toy: str, explain: _Explain) -> None:
    with pytest.raises(ConfigError):
        cli.main(["explain", toy, "--debug", "--streams", "0"])


def test_plain_output_is_the_text_form_of_the_report(
    toy: str, explain: _Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", toy]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Toy: 2 residual sites found in 1 trunk")
    assert "mixing  2     model.py:3, model.py:5  reason of mixing" in lines
    assert lines[-1] == "note: graph break at model.py:9"
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_a_terminal_gets_tables_with_the_same_content(
    toy: str, explain: _Explain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["explain", toy, "--all"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[" in shown
    for word in ("h.0.add0", "its skip is a slice", "model.py:5", "graph break at model.py:9"):
        assert word in shown


def test_json_is_all_that_standard_output_gets(
    toy: str, explain: _Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", toy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(example_report().to_json())


def test_require_match_exits_with_1_where_nothing_can_be_converted(
    toy: str, explain: _Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", toy, "--require-match"]) == 0
    explain.result = Report(model="Linear", config={}, graphs=1)
    assert cli.main(["explain", toy]) == 0
    assert cli.main(["explain", toy, "--require-match"]) == 1
    assert "no residual site" in capsys.readouterr().err


def test_flags_and_settings_arrive_at_the_configuration_and_the_target(
    toy: str, explain: _Explain
) -> None:
    flags = "--streams 2 --constraint sinkhorn_softmax --iters 5 --pre-eps 0.001 --norm-eps 1e-5"
    flags += " --sinkhorn-eps 1e-4 --collapse learned --init paper --static"
    flags += " --include h.* --include g.* --exclude h.0.* --set width=6"
    assert cli.main(["explain", toy, *flags.split()]) == 0
    assert explain.width == 6
    assert explain.config == MHCConfig(
        streams=2,
        constraint="sinkhorn_softmax",
        sinkhorn_iters=5,
        sinkhorn_eps=1e-4,
        pre_eps=0.001,
        norm_eps=1e-5,
        dynamic=False,
        collapse="learned",
        init="paper",
        include=("h.*", "g.*"),
        exclude=("h.0.*",),
    )


def test_without_flags_the_configuration_is_the_default(toy: str, explain: _Explain) -> None:
    assert cli.main(["explain", toy]) == 0
    assert explain.config == MHCConfig()


def test_explain_finds_the_sites_of_a_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "hf:gpt2", "--require-match", "--set", "n_layer=3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in report["sites"]] == [
        f"transformer.h.{layer}.add{add}" for layer in range(3) for add in range(2)
    ]
    assert len(report["trunks"]) == 1


def test_dump_shows_mhc_ops_where_the_residual_adds_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dump", "hf:gpt2", "--out", str(tmp_path), "--set", "n_layer=1"]) == 0
    assert "GPT2LMHeadModel: 2 residual sites" in capsys.readouterr().out
    graph = tmp_path / "graph_0" / "fw"
    before, after = (graph / f"{name}.txt" for name in ("00_before", "99_after"))
    assert "torch.ops.mhc" not in before.read_text()
    for op, times in {"expand": 1, "pre": 2, "post": 2, "collapse": 1}.items():
        assert after.read_text().count(f"torch.ops.mhc.{op}.default(") == times
    diff = (graph / "before_after.diff").read_text()
    assert any(line.startswith("-") and "attn_output" in line for line in diff.splitlines())


@pytest.mark.slow
def test_dump_of_a_model_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli.main(["dump", "hf:llama", "--out", str(tmp_path / name), "--json"]) == 0
    first = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.*")}
    second = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.*")}
    assert first == second
    assert len(first) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["hf:gpt2", "hf:llama", "hf:t5", "hf:vit"])
def test_verify_passes_on_real_architectures(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", target, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert len(report["checks"]) == 9


def test_verify_exits_with_1_and_names_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cli_residual_model.py"
    path.write_text(RESIDUAL)
    assert cli.main(["verify", f"{path}:build", "--iters", "1"]) == 1
    shown = capsys.readouterr()
    assert "a property does not hold" in shown.out
    assert any(line.endswith("FAILED") for line in shown.out.splitlines())
    assert shown.err.startswith("error: Residual: column sums of H_res:")
