"""The examples run, from the command line to their last line."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

installed = pytest.mark.skipif(
    not entry_points(group="torch_dynamo_backends", name="mhc"),
    reason="backend='mhc' is known by name once the package is installed",
)


def _run(script: str, *arguments: str) -> str:
    """The standard output of an example."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@installed
@pytest.mark.slow
def test_a_gpt2_is_converted_and_learns() -> None:
    out = _run("convert_gpt2.py", "--inner=aot_eager", "--steps=4")
    assert out.count("new parameters") == 4
    losses = [float(x) for x in out.splitlines()[-1].removeprefix("losses:").split()]
    assert losses[-1] < losses[0] - 0.1


@installed
@pytest.mark.slow
def test_a_vit_keeps_its_function() -> None:
    out = _run("convert_vit.py", "--inner=aot_eager", "--streams=2")
    assert out.startswith("6 sites in 1 trunk")
    assert float(out.split()[-1]) < 1e-5


@installed
@pytest.mark.slow
def test_a_deepseek_is_recognised_and_keeps_its_gradients() -> None:
    out = _run("accelerate_deepseek.py", "--inner=aot_eager", "--layers=1")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["expand", "site", "site", "collapse"]
    assert float(lines[-1].split()[-1]) < 1e-5


@pytest.mark.slow
def test_a_model_is_inspected_with_reasons_and_pictures(tmp_path: Path) -> None:
    out = _run("inspect_model.py", f"--out={tmp_path / 'd'}")
    assert "6 residual sites converted in 1 trunk" in out
    assert "6 other adds" in out
    page = (tmp_path / "d" / "index.html").read_text()
    assert page.count("<svg ") == 2
    assert "× 6" in page


@installed
@pytest.mark.slow
def test_gains_part_while_training_and_are_written_down(tmp_path: Path) -> None:
    arguments = ("--steps=6", "--every=3", "--layers=2", "--inner=aot_eager", "--no-plots")
    out = _run("plot_stability.py", *arguments, f"--out={tmp_path}")
    rows = [line.split() for line in out.splitlines() if line.startswith(("hyper", "mHC"))]
    assert [row[1] for row in rows] == ["0", "3", "6"] * 2
    hyper, mhc = float(rows[2][2]), float(rows[5][2])
    assert mhc == pytest.approx(1, abs=1e-4)
    assert abs(hyper - 1) > 1e-3
    for name in ("none", "sinkhorn"):
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert len(lines) == 1 + 3 * (1 + 4)


@installed
@pytest.mark.slow
def test_training_compares_three_models_that_start_alike_and_learn() -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "train_gpt.py"),
            "--steps=12",
            "--inner=aot_eager",
            "--json",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    plain, hyper, mhc = json.loads(done.stdout)
    assert [row["model"] for row in (plain, hyper, mhc)] == ["plain", "hyper-connections", "mHC"]
    for row in (plain, hyper, mhc):
        assert row["first_loss"] == pytest.approx(math.log(256), abs=0.5)
        assert row["first_loss"] == pytest.approx(plain["first_loss"], rel=2e-6)
        assert row["last_loss"] < row["first_loss"] - 1
    assert mhc["forward_gain"] == pytest.approx(1, abs=1e-5)
    assert mhc["backward_gain"] == pytest.approx(1, abs=1e-2)
    assert abs(hyper["forward_gain"] - 1) > 0.01
    assert mhc["spread"] > 1e-5


@installed
@pytest.mark.slow
def test_layouts_train_alike_and_resume_from_each_other(tmp_path: Path) -> None:
    flags = ("train_distributed.py", "--inner=aot_eager", "--layers=2")
    whole = _losses(_torchrun(1, *flags, "--steps=4"))
    saved = str(tmp_path / "checkpoint")
    before = _torchrun(2, *flags, "--steps=2", "--pp=2", f"--checkpoint={saved}")
    after = _torchrun(2, *flags, "--steps=2", "--first=2", "--tp=2", f"--resume={saved}")
    assert "2 stages, 1024 bytes a token" in before  # 4 streams of 64 channels in float32
    assert _losses(before + after) == pytest.approx(whole, abs=1e-5)
    assert whole[-1] < whole[0] - 0.5


def _torchrun(processes: int, *arguments: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={processes}",
            *(str(EXAMPLES / arguments[0]), *arguments[1:]),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


def _losses(out: str) -> list[float]:
    return [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
