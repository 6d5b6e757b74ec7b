"""A checkpoint of one layout is loaded in another, mhc parameters and optimizer included."""

from pathlib import Path

import pytest

from tests.distributed import checkpoints
from tests.distributed.models import fresh
from tests.distributed.ranks import on_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((2, "fsdp"), (1, "alone")),
        ((4, "two dimensions"), (2, "fsdp")),
        ((1, "alone"), (2, "fsdp")),
    ],
)
def test_training_goes_on_in_another_layout(
    saved: tuple[int, str], loaded: tuple[int, str], tmp_path: Path
) -> None:
    folder, expected = str(tmp_path / "moved"), str(tmp_path / "alone")
    whole, names = on_ranks(1, checkpoints.train, "alone", expected, 0, 4)[0]
    assert names == sorted(fresh().state_dict())
    before, held = on_ranks(saved[0], checkpoints.train, saved[1], folder, 0, 2)[0]
    after, _ = on_ranks(loaded[0], checkpoints.train, loaded[1], folder, 2, 4)[0]
    assert held == names
    assert before + after == pytest.approx(whole, abs=1e-6)
