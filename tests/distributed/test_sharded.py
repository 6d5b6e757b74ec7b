"""Ops on DTensors that are sharded over tokens: the results and gradients of whole tensors."""

import pytest

from tests.distributed import sharded
from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize("case", sharded.CASES)
def test_every_op_takes_states_that_are_sharded_over_tokens(case: str) -> None:
    for found in on_ranks(2, sharded.distances, case):
        assert max(found) <= 1e-6
