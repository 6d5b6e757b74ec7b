"""The harness of the distributed tests says what went wrong, and never waits for ever."""

import os
import signal
import time

import pytest
import torch
from torch import distributed as dist

from tests.distributed.ranks import on_ranks, outcomes


def _sum(rank: int) -> float:
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    return float(value)


def _fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has a reason")
    dist.barrier()


def _die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_ranks_talk_to_each_other_and_return_values() -> None:
    assert on_ranks(2, _sum) == [3, 3]


def test_a_rank_that_raises_is_shown_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with 1"):
        on_ranks(2, _fail, patience=5)
    ended = outcomes(2, _fail, patience=5)
    assert "rank 1 has a reason" in ended[1].error
    assert "RuntimeError" in ended[0].error


def test_a_rank_that_dies_is_told_from_one_that_raises() -> None:
    alive, killed = outcomes(2, _die, patience=5)
    assert killed.exitcode == -signal.SIGKILL
    assert alive.exitcode == 1


def test_a_rank_that_hangs_is_killed_in_time() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] still run after 3 s"):
        outcomes(2, _hang, seconds=3)
