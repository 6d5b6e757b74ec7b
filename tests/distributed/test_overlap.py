"""Work behind collectives between real processes: nothing of a training step changes."""

import pytest

from tests.distributed.ranks import on_ranks
from tests.tensor_parallel import overlapped_step


@pytest.mark.parametrize("recompute", ["auto", pytest.param("off", marks=pytest.mark.slow)])
def test_a_step_on_two_ranks_keeps_its_bits_and_fills_every_window(recompute: str) -> None:
    first, second = on_ranks(2, overlapped_step, recompute)
    assert first == second
    assert first["equal"]
    assert {"split_sites_pass", "overlap_collectives_pass"} <= first["passes"]
    assert len(first["moved"]) == 4  # one forward and one backward for each of two sites
    assert all(before == 0 < after for before, after in first["moved"])
