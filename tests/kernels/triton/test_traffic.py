"""The rows that every form of every op is said to move, counted in the interpreter."""

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.traffic import forms

pytestmark = pytest.mark.interpreted

TOKENS, CHANNELS = 2, 16
SITES = {
    "dynamic": (SiteSpec(streams=2, iters=1), torch.bfloat16),
    "static": (SiteSpec(streams=3, constraint="none", dynamic=False), torch.float32),
}


@pytest.mark.parametrize("site", list(SITES))
def test_every_form_of_every_op_moves_the_rows_it_is_said_to(site: str) -> None:
    from tests.kernels.triton.forms import metered  # imports the interpreter

    spec, dtype = SITES[site]
    found = metered(spec, TOKENS, CHANNELS, dtype)
    row = TOKENS * CHANNELS * dtype.itemsize
    expected = {(form.op, form.kernels): form.rows * row for form in forms(spec)}
    assert {key: moved for key, (_, moved) in found.items()} == expected
    for meter, _ in found.values():
        meter.check()


def test_one_kernel_for_an_op_moves_no_more_than_it_must() -> None:
    found = forms(SiteSpec(streams=4))
    assert {form.rows / form.least for form in found if len(form.kernels) == 1} == {1.0}
    assert all(form.rows > form.least for form in found if len(form.kernels) > 1)
