"""Ranks that differ and ranks that die: an error on every rank, and a way to go on."""

import signal
from pathlib import Path

import pytest

from tests.distributed import checkpoints
from tests.distributed.ranks import on_ranks, outcomes


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("iterations", "ConfigError", "sinkhorn_iters=20 on rank 0, 10 on rank 1"),
        ("converted", "ConfigError", "rank 1 is not converted, rank 0 is"),
        (
            "layers",
            "UnsupportedGraphError",
            "4 on rank 0, 2 on rank 1, where layers.1.add0 is missing",
        ),
        ("nothing", "", ""),
    ],
)
def test_ranks_that_were_converted_differently_learn_so(what: str, kind: str, words: str) -> None:
    found = on_ranks(2, checkpoints.convert_differently, what)
    for found_kind, message in found:
        assert found_kind == kind
        assert words in message
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_rank_that_is_killed_stops_the_others_and_training_resumes(tmp_path: Path) -> None:
    whole, _ = on_ranks(2, checkpoints.train, "fsdp", str(tmp_path / "whole"), 0, 5)[0]
    folder = str(tmp_path / "cut")
    alive, killed = outcomes(2, checkpoints.train, "fsdp", folder, 0, 5, 3)
    assert killed.exitcode == -signal.SIGKILL
    assert alive.exitcode == 1
    assert "RuntimeError" in alive.error
    resumed, _ = on_ranks(2, checkpoints.train, "fsdp", folder, 3, 5)[0]
    assert resumed == whole[3:]
