"""A converted model cut into stages trains on 2 and 4 ranks as on one, under each schedule."""

import itertools

import pytest

from tests.distributed import pipelines
from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize(
    ("world", "schedule", "compiled"),
    [
        pytest.param(*case, marks=() if case == (2, "1f1b", False) else pytest.mark.slow)
        for case in itertools.product((2, 4), pipelines.SCHEDULES, (False, True))
    ],
)
def test_losses_and_all_gradients_are_those_of_one_process(
    world: int, schedule: str, compiled: bool
) -> None:
    found = on_ranks(world, pipelines.train, schedule, compiled)
    assert sum(rank["covered"] for rank in found) == 1
    for rank in found:
        assert rank["loss"] <= 1e-6
        assert rank["gradient"] <= 1e-6
