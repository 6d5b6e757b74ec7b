"""The bytes that each kernel moves, counted in the interpreter: rows of C per token for n = 4."""

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch, site
from mhc_compile.kernels.triton.emit import kernels
from tests.kernels.triton.sites import Seam, make_seam, make_spec, run_halves, run_seam

pytestmark = pytest.mark.interpreted

TOKENS, CHANNELS = 9, 264
STREAM_ARGUMENTS = {name for kernel in kernels(SiteSpec(streams=4)).values()
                    for name in kernel.streams}  # fmt: skip

FORWARD = {"seam": 10, "seam_scan": 9, "pre_mix": 5, "pre": 5, "pre_scan": 4, "post": 9}
BACKWARD = {
    "seam_backward_maps": 6, "seam_backward_streams": 15, "seam_backward_phi": 5,
    "pre_backward_maps": 5, "pre_backward_streams": 9, "pre_backward_phi": 4, "post_backward": 14,
}  # fmt: skip
STATIC = {"static_seam": 10, "static_seam_backward": 15, "static_pre": 5, "static_pre_backward": 9}


@pytest.fixture(params=[True, False], ids=["one launch", "scan and mix"])
def one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(site, "one_launch", lambda *_: request.param)
    return bool(request.param)


def _rows(seam: Seam) -> dict[str, float]:
    """Rows of stream elements per token that each kernel moves; all accesses are safe."""
    from tests.kernels.triton.meter import Meter  # imports the interpreter

    with Meter() as meter:
        run_seam(seam)
        run_halves(seam)
    meter.check()
    tokens, _, channels = seam.X.shape
    row = tokens * channels * seam.X.element_size()
    names = {one.kernel for one in meter.launches}
    return {
        name: meter.moved(STREAM_ARGUMENTS, name) / row
        for name in names
        if meter.moved(STREAM_ARGUMENTS, name)
    }


def test_every_kernel_moves_each_stream_element_once(one_launch: bool) -> None:
    rows = _rows(make_seam(make_spec("sinkhorn", 4, iters=1), TOKENS, CHANNELS,
                           dtype=torch.bfloat16))  # fmt: skip
    absent = ("seam_scan", "pre_scan", "pre_mix") if one_launch else ("seam", "pre")
    forward = {name: count for name, count in FORWARD.items() if name not in absent}
    if not one_launch:
        forward["pre_mix"] *= 2  # of the seam, and of pre alone
    assert rows == forward | BACKWARD


def test_a_seam_moves_10_or_14_rows_forward_and_26_backward() -> None:
    assert FORWARD["seam"] == 10
    assert FORWARD["seam_scan"] + FORWARD["pre_mix"] == 14
    assert sum(count for name, count in BACKWARD.items() if name.startswith("seam")) == 26


def test_a_static_seam_moves_10_rows_forward_and_15_backward() -> None:
    rows = _rows(make_seam(make_spec("none", 4, dynamic=False), TOKENS, CHANNELS))
    assert rows == STATIC | {"post": 9, "post_backward": 14}


def test_no_torch_operation_runs_beside_the_kernels() -> None:
    from tests.kernels.triton.meter import Meter

    seam = make_seam(make_spec("kronecker", 2), 3, 48)
    with Meter() as meter:
        run_seam(seam)
    assert meter.eager == []
    assert [one.kernel for one in meter.launches] == [
        "seam_scan", "pre_mix", "seam_backward_maps", "seam_backward_streams", "sum_products",
        "seam_backward_phi", "sum_rows", "pre_sum_maps",
    ]  # fmt: skip


def test_the_ends_move_each_stream_element_once() -> None:
    from tests.kernels.triton.meter import Meter

    spec, X = SiteSpec(streams=4), torch.randn(TOKENS, 4, CHANNELS)
    with Meter() as meter:
        launch.collapse(X, None, None, None, "mean", spec)
        launch.expand(X[:, 0].contiguous(), spec)
    meter.check()
    row = TOKENS * CHANNELS * 4
    assert meter.moved(STREAM_ARGUMENTS, "collapse_mean") == 5 * row
    assert meter.moved(STREAM_ARGUMENTS, "expand") == 5 * row
