"""The interpreter's bf16 and the byte meter, against numbers known beforehand."""

from typing import Any

import pytest
import torch

from tests.kernels.triton import sample_kernels as kernels

pytestmark = pytest.mark.interpreted


def _meter() -> Any:
    from tests.kernels.triton.meter import Meter  # only an interpreting process can import it

    return Meter()


def test_casts_to_bf16_round_to_nearest_even() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1 + 2**-8, 1e-40, 3.4e38])
    values = torch.cat([torch.randn(4096 - len(special)), special])
    rounded = torch.empty(4096, dtype=torch.bfloat16)
    kernels.cast[(1,)](values, rounded, 4096)
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded.nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))
    back = torch.empty(4096)
    kernels.cast[(1,)](rounded, back, 4096)
    assert torch.equal(back.nan_to_num(7.0), rounded.float().nan_to_num(7.0))


def test_a_product_of_bf16_matrices_is_exact() -> None:
    x, y, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    kernels.dot_bf16[(1,)](x, y, out)
    assert (out - x.double() @ y.double()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["add", "negate", "compare", "sum"])
def test_arithmetic_on_bf16_is_refused(kind: str) -> None:
    x, y, out = torch.randn(3, 16).bfloat16()
    with pytest.raises(Exception, match="on bf16: convert to float32 first"):
        kernels.arithmetic_in_bf16[(1,)](x, y, out, kind, 16)


def test_bytes_of_a_copy_are_those_of_its_tensors() -> None:
    x, y = torch.randn(1000), torch.empty(1000)
    with _meter() as meter:
        kernels.copy[(4,)](x, y, 1000, 256)
    assert torch.equal(x, y)
    meter.check()
    assert meter.eager == []
    assert (meter.moved(["x"]), meter.moved(["y"]), meter.moved(["x", "y"])) == (4000, 4000, 8000)
    assert meter.launches[0].programs == 4
    assert "x load: compulsory 4000, shared 4000, reread 0" in meter.table()


def test_what_three_programs_read_twice_is_compulsory_once() -> None:
    x, y = torch.rand(64), torch.empty(3, 64)
    with _meter() as meter:
        kernels.two_passes_over_a_shared_row[(3,)](x, y, 64)
    torch.testing.assert_close(y, (x / x.sum()).expand(3, 64))
    load = meter.launches[0].accesses["x", "load"]
    assert (load.compulsory, load.shared, load.reread) == (256, 768, 0)
    meter.check()


def test_torch_operations_in_the_region_are_listed_with_their_bytes() -> None:
    x = torch.randn(10)
    with _meter() as meter:
        x.view(2, 5) + 1
        torch.empty(100)
    assert meter.eager == [("add", 80)]


def test_programs_that_overlap_are_a_race() -> None:
    with _meter() as meter:
        kernels.overlapping[(3,)](torch.randn(1024), torch.empty(1024), 256)
    assert meter.launches[0].races == 1024
    with pytest.raises(AssertionError, match="'races': 1024"):
        meter.check()


def test_lanes_outside_every_tensor_are_found_and_not_executed() -> None:
    whole = torch.zeros(1024)
    with _meter() as meter:
        kernels.copy[(4,)](torch.randn(1024), whole[:512], 1024, 256)
    assert meter.launches[0].stray == 512
    assert not whole[512:].any()


@pytest.mark.parametrize(("fence", "unfenced"), [(False, 256), (True, 0)])
def test_reading_back_without_a_barrier_is_found(fence: bool, unfenced: int) -> None:
    x, y, out = torch.randn(64), torch.empty(64), torch.empty(64)
    with _meter() as meter:
        kernels.reading_back[(1,)](x, y, out, fence, 64)
    assert torch.equal(out, x.flip(0))
    assert meter.launches[0].unfenced == unfenced
    load = meter.launches[0].accesses["y", "load"]
    assert (load.reread, load.compulsory) == (256, 0)


def test_atomics_are_refused() -> None:
    with _meter(), pytest.raises(Exception, match="atomics"):
        kernels.accumulate[(2,)](torch.randn(128), torch.zeros(1), 64)
