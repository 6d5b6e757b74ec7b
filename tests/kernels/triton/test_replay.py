"""The generated replay in the interpreter: what the sites made, in one launch a few sites."""

import pytest
import torch

from mhc_compile.kernels.spec import REPLAYED
from mhc_compile.kernels.triton import launch
from tests.kernels.replays import error, make_chain
from tests.kernels.triton.sites import TOLERANCE

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("name", "n", "shape", "sites"),
    [
        ("sinkhorn", 4, (3, 48), 3),
        ("none", 2, (5, 129), 2),
        ("identity", 3, (1, 16), 1),
        ("sinkhorn_softmax", 4, (2, 600), 0),
        ("kronecker", 2, (3, 16), REPLAYED + 2),
    ],
)
def test_chains_follow_float64_and_are_written_whole(
    name: str, n: int, shape: tuple[int, int], sites: int
) -> None:
    torch.use_deterministic_algorithms(True)  # poisons memory without values
    try:
        chain = make_chain(name, n, shape, sites, iters=3)
        found = launch.replay(*chain.given, chain.spec)
    finally:
        torch.use_deterministic_algorithms(False)
    truth = make_chain(name, n, shape, sites, torch.float64, iters=3).made
    assert max(map(error, found, truth)) <= TOLERANCE
    if sites:
        rest = chain.without_the_first_read()
        again = launch.replay(*rest.given, rest.spec)
        assert all(torch.equal(one, other) for one, other in zip(again, found[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_are_rounded_where_the_sites_rounded_them(dtype: torch.dtype) -> None:
    chain = make_chain("kronecker", 2, (3, 64), 3, dtype)
    for found, made in zip(launch.replay(*chain.given, chain.spec), chain.made, strict=True):
        assert error(found, made) <= 1e-6


def test_a_chain_is_one_launch() -> None:
    from tests.kernels.triton.meter import Meter

    chain = make_chain("kronecker", 2, (3, 48), 3)
    with Meter() as meter:
        launch.replay(*chain.given, chain.spec)
    assert [one.kernel for one in meter.launches] == ["replay_3_4"]
    assert meter.eager == []
    meter.check()
