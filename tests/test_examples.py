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
