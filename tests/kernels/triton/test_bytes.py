"""The bytes that the kernels of four streams move: the numbers, counted over several blocks."""

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.traffic import forms
from tests.kernels.triton.sites import make_seam, make_spec, run_seam

FOUR = SiteSpec(streams=4)
STATIC = SiteSpec(streams=4, dynamic=False)


@pytest.mark.parametrize(
    ("spec", "op", "rows"),
    [
        (FOUR, "seam", [10, 14]),
        (FOUR, "seam_backward", [26]),
        (FOUR, "post", [9]),
        (FOUR, "mix", [8]),
        (FOUR, "post_backward", [14]),
        (FOUR, "pre", [5, 9]),
        (FOUR, "pre_backward", [18]),
        (FOUR, "pre_backward, more", [22]),
        (FOUR, "pre_backward_dz", [14]),
        (FOUR, "phi_backward", [4]),
        (FOUR, "seam_backward_dz", [21]),
        (FOUR, "phi_backward, seam", [5]),
        (FOUR, "post_backward_branch", [5]),
        (FOUR, "post_backward_state", [13]),
        (STATIC, "seam", [10]),
        (STATIC, "seam_backward", [15]),
    ],
)
def test_rows_of_stream_that_each_op_of_four_streams_moves(
    spec: SiteSpec, op: str, rows: list[int]
) -> None:
    assert [form.rows for form in forms(spec) if form.op == op] == rows


@pytest.mark.interpreted
@pytest.mark.slow
@pytest.mark.parametrize("spec", [FOUR, STATIC], ids=["dynamic", "static"])
def test_several_blocks_of_tokens_and_channels_move_the_same_rows(spec: SiteSpec) -> None:
    from tests.kernels.triton.forms import metered  # imports the interpreter

    found = metered(spec, 37, 520, torch.bfloat16)
    row = 37 * 520 * 2
    expected = {(form.op, form.kernels): form.rows * row for form in forms(spec)}
    assert {key: moved for key, (_, moved) in found.items()} == expected
    for meter, _ in found.values():
        meter.check()


@pytest.mark.interpreted
def test_no_torch_operation_runs_beside_the_kernels() -> None:
    from tests.kernels.triton.meter import Meter

    seam = make_seam(make_spec("kronecker", 2), 3, 48)
    with Meter() as meter:
        run_seam(seam)
    assert meter.eager == []
    assert [one.kernel for one in meter.launches] == [
        "seam_scan",
        "pre_mix",
        "seam_backward_maps",
        "seam_backward_streams",
        "sum_products",
        "seam_backward_phi",
        "sum_rows",
        "pre_sum_maps",
    ]
