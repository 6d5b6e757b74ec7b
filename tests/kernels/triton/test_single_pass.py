"""The generated Triton of single-pass sites, interpreted: values, gradients, rows, completeness."""

from collections.abc import Iterator

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import site
from mhc_compile.kernels.triton.emit import kernels
from mhc_compile.kernels.triton.traffic import forms
from tests.kernels.triton.sites import (
    check,
    error,
    errors,
    exact_read,
    exact_seam,
    make_seam,
    make_spec,
    run_halves,
    run_read,
    run_seam,
    seam_outputs,
)

FOUR = SiteSpec(streams=4, single_pass=True)
SITES = [
    ("sinkhorn", 4), ("sinkhorn_softmax", 3), ("identity", 2), ("permutations", 3),
    ("kronecker", 2), ("orthogonal", 3), ("sinkhorn_exp", 1),
]  # fmt: skip
SHAPES = [(1, 16), (3, 129), (37, 200)]


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.interpreted
@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("whole", [True, False], ids=["one launch", "scan and mix"])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_every_op_follows_float64(
    name: str, n: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "one_launch", lambda *_: whole)
    seam = make_seam(make_spec(name, n, single_pass=True), 9, 48)
    exact = exact_seam(seam)
    check(run_seam(seam), exact)
    check(run_halves(seam), exact)
    check(run_read(seam), exact_read(seam))


@pytest.mark.interpreted
@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_every_shape_is_written_whole(tokens: int, channels: int) -> None:
    seam = make_seam(make_spec("kronecker", 2, single_pass=True), tokens, channels)
    exact = exact_seam(seam)
    check(run_seam(seam), exact)
    check(run_halves(seam), exact)
    check(run_read(seam), exact_read(seam))


@pytest.mark.interpreted
@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 3), ("identity", 2)])
def test_static_sites_follow_float64(name: str, n: int) -> None:
    seam = make_seam(make_spec(name, n, dynamic=False, single_pass=True), 9, 48)
    exact = exact_seam(seam)
    check(run_seam(seam), exact)
    check(run_halves(seam), exact)
    check(run_read(seam), exact_read(seam))


@pytest.mark.interpreted
@pytest.mark.slow
@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 6), ("kronecker", 8)])
def test_many_streams_follow_float64(name: str, n: int) -> None:
    seam = make_seam(make_spec(name, n, single_pass=True), 19, 264)
    check(run_seam(seam), exact_seam(seam))
    check(run_halves(seam), exact_seam(seam))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_only_carry_the_rounding_of_the_outputs(dtype: torch.dtype) -> None:
    seam = make_seam(make_spec("sinkhorn", 3, single_pass=True), 9, 72, dtype=dtype)
    found, exact = run_seam(seam), exact_seam(seam)
    far = errors(found, exact)
    rounding = error(exact["next"].to(dtype), exact["next"])
    assert far["next"] <= 1.01 * rounding, far
    assert all(value <= 4 * rounding for value in far.values()), far


@pytest.mark.interpreted
def test_two_runs_give_bitwise_the_same() -> None:
    seam = make_seam(make_spec("kronecker", 2, single_pass=True), 19, 24)
    first, second = run_seam(seam), run_seam(seam)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.interpreted
def test_scan_and_mix_give_the_bits_of_one_launch_for_u(monkeypatch: pytest.MonkeyPatch) -> None:
    seam = make_seam(make_spec("sinkhorn", 2, single_pass=True), 19, 264)
    apart = seam_outputs(seam)
    monkeypatch.setattr(site, "one_launch", lambda *_: True)
    whole = seam_outputs(seam)
    assert torch.equal(whole[0], apart[0])
    assert torch.equal(whole[1], apart[1])


@pytest.mark.interpreted
@pytest.mark.parametrize("dynamic", [True, False])
def test_every_form_of_every_op_moves_the_rows_it_is_said_to(dynamic: bool) -> None:
    from tests.kernels.triton.forms import metered  # imports the interpreter

    spec = SiteSpec(streams=2, iters=1, single_pass=True, dynamic=dynamic)
    found = metered(spec, 2, 16, torch.bfloat16)
    row = 2 * 16 * 2
    expected = {(form.op, form.kernels): form.rows * row for form in forms(spec)}
    assert {key: moved for key, (_, moved) in found.items()} == expected
    for meter, _ in found.values():
        meter.check()


@pytest.mark.parametrize(
    ("op", "rows"),
    [
        ("seam", [10, 10]),
        ("pre", [5, 5]),
        ("read", [5]),
        ("read_backward", [9]),
        ("seam_backward", [20]),
        ("pre_backward", [13]),
    ],
)
def test_no_form_of_a_single_pass_reads_the_state_twice_forward(op: str, rows: list[int]) -> None:
    assert [form.rows for form in forms(FOUR) if form.op == op] == rows


def test_one_launch_needs_no_cache() -> None:
    from mhc_compile.kernels.triton.maps import site_maps
    from mhc_compile.kernels.triton.targets import TARGETS
    from mhc_compile.kernels.triton.tiles import one_launch

    two_pass = site_maps(SiteSpec(streams=4))
    for target in TARGETS.values():
        wide = (7168, torch.bfloat16, 1 << 20, target)
        assert one_launch(site_maps(FOUR), *wide)
        assert not one_launch(two_pass, *wide)


def test_kernels_of_the_mappings_touch_no_streams_in_the_backward() -> None:
    known = kernels(FOUR)
    assert known["pre_backward_maps"].streams == known["pre_mix"].streams == ()
    assert "seam_backward_maps" not in known
    assert not [name for name in known if name.startswith("head")]
