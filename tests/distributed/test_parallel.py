"""A converted model trains on several ranks as on one: DDP, FSDP2, tensor parallelism and both."""

import itertools
from typing import Any

import pytest

from tests.distributed import parallel
from tests.distributed.ranks import on_ranks

_BOUND = 1e-6


def _assert_alike(found: dict[str, Any]) -> None:
    if "loss" not in found:  # several ways of one scenario
        for distance in found.values():
            _assert_alike(distance)
    else:
        assert found["covered"] == 1
        assert found["loss"] <= _BOUND
        assert found["gradient"] <= _BOUND


_SCENARIOS = (
    parallel.sequence_parallel,
    parallel.ddp,
    parallel.tensor_parallel,
    parallel.dtensor_trunk,
    parallel.fsdp,
    parallel.tensor_parallel_and_fsdp,
)
_QUICK = (2, parallel.sequence_parallel)


@pytest.mark.parametrize(
    ("world", "scenario"),
    [
        pytest.param(*case, marks=() if case == _QUICK else pytest.mark.slow)
        for case in itertools.product((2, 4), _SCENARIOS)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_losses_and_all_gradients_are_those_of_one_process(world: int, scenario: Any) -> None:
    for found in on_ranks(world, scenario):
        _assert_alike(found)


@pytest.mark.slow
def test_without_the_sum_over_the_sequence_mhc_gradients_are_wrong() -> None:
    """The check above finds the fault that `all_reduce_gradients_` is for."""
    for found in on_ranks(2, parallel.sequence_parallel, False):
        assert found["gradient"] > 100 * _BOUND


@pytest.mark.slow
def test_collectives_in_a_graph_go_through_inductor() -> None:
    for found in on_ranks(2, parallel.sequence_parallel, True, "inductor"):
        assert found["loss"] <= 10 * _BOUND  # fused kernels round elsewhere
        assert found["gradient"] <= 10 * _BOUND
