"""Work behind collectives between real processes: nothing of a training step changes."""

from dataclasses import replace

import pytest

from mhc_compile.passes.estimate import CPU
from tests.distributed.ranks import on_ranks
from tests.tensor_parallel import overlapped_step

ARITHMETIC = replace(CPU, launch=0.0, op_launch=0.0, single_flops=1e9, link_latency=1.0)
"""Work takes its flops, and any collective longer."""


@pytest.mark.parametrize(
    # Without blocks the second site is a seam, which the estimate leaves whole at this size.
    ("recompute", "filled"),
    [("auto", 4), pytest.param("off", 3, marks=pytest.mark.slow)],
)
def test_a_step_on_two_ranks_keeps_its_bits_and_fills_its_windows(
    recompute: str, filled: int
) -> None:
    first, second = on_ranks(2, overlapped_step, recompute)
    assert first == second
    assert first["equal"]
    assert {"split_sites_pass", "overlap_collectives_pass"} <= first["passes"]
    assert len(first["moved"]) == 4  # one forward and one backward for each of two sites
    assert not any(before for before, _ in first["moved"])
    assert sum(after > 0 for _, after in first["moved"]) == filled


@pytest.mark.parametrize("train", [True, False])
def test_posts_that_mix_their_streams_first_keep_the_bits_of_a_step(train: bool) -> None:
    first, second = on_ranks(2, overlapped_step, "auto", ARITHMETIC, train)
    assert first == second
    assert first["equal"]
    assert first["mixed"] == 2  # one for each of two sites
    assert all(after > before for before, after in first["moved"])
