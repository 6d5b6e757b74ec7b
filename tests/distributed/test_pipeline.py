"""A converted model cut into stages trains on two ranks as on one, under each schedule."""

import pytest

from tests.distributed import pipelines
from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize(
    ("schedule", "compiled"),
    [
        ("1f1b", False),
        pytest.param("1f1b", True, marks=pytest.mark.slow),
        pytest.param("interleaved", False, marks=pytest.mark.slow),
        pytest.param("zbv", False, marks=pytest.mark.slow),
        pytest.param("zbv", True, marks=pytest.mark.slow),
        pytest.param("dualpipev", False, marks=pytest.mark.slow),
        pytest.param("dualpipev", True, marks=pytest.mark.slow),
    ],
)
def test_losses_and_all_gradients_are_those_of_one_process(schedule: str, compiled: bool) -> None:
    found = on_ranks(2, pipelines.train, schedule, compiled)
    assert sum(rank["covered"] for rank in found) == 1
    for rank in found:
        assert rank["loss"] <= 1e-6
        assert rank["gradient"] <= 1e-6
