"""Hand-written sites become mhc ops, however they are spelt; near misses stay what they are."""

import pytest
import torch
from torch import nn

from mhc_compile.kernels.spec import SiteSpec
from tests.passes.chain_graphs import Rewritten, assert_same, rewritten
from tests.passes import hyper_spellings as near
from tests.passes.hyper_spellings import C, EPS, N, NORM_EPS, SPELLINGS, Site


def _state(n: int = N, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, n, C, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda kind: kind.__name__)
def test_every_spelling_becomes_one_pre_and_one_post(spelling: type[Site]) -> None:
    found = assert_same(spelling().double(), _state(), tolerance=1e-9)
    assert found.ops == ["pre", "post"]
    assert found.kinds == ["site"] and not found.reasons
    spec = SiteSpec.decode(found.chains[0].what)
    assert spec.constraint == SPELLINGS[spelling]
    assert spec.norm_eps == pytest.approx(NORM_EPS, rel=1e-9)
    assert spec.iters == (20 if spec.constraint == "identity" else Site.iters)
    assert spec.sinkhorn_eps in (0.0, EPS)


@pytest.mark.parametrize(
    ("near_miss", "reason"),
    [
        (near.LacksAColumnStep, "normalises rows twice"),
        (near.MatrixUsedTwice, "mixing matrix is read elsewhere"),
        (near.IterateUsedTwice, "mixing matrix is read elsewhere"),
        (near.WrongAxis, None),
        (near.OddEps, "eps in places"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_near_misses_are_left_alone(near_miss: type[Site], reason: str | None) -> None:
    found = assert_same(near_miss().double(), _state(), tolerance=0.0)
    assert found.ops == [] and found.kinds == []
    assert reason is None or any(reason in text for text in found.reasons)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (near.GateOfAnotherStream, None),
        (near.EpsOutsideTheRoot, "eps is added outside the root"),
        (near.NotNormed, "not of a normed state"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_of_another_site_the_sinkhorn_alone_becomes_an_op(
    other: type[Site], reason: str | None
) -> None:
    found = assert_same(other().double(), _state(), tolerance=1e-9)
    assert found.ops == ["sinkhorn"] and found.kinds == ["sinkhorn"]
    assert reason is None or any(reason in text for text in found.reasons)
