"""The generated Triton of ``mhc::seam_norm``: interpreted against float64, bytes, registers."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import site
from mhc_compile.kernels.triton.emit import kernels, source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.signatures import aot_variants
from mhc_compile.kernels.triton.stats import kernel_stats
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.traffic import forms
from tests.kernels.cpp_runs import OPS, check, random_site
from tests.kernels.norm_runs import NORMS, normed, run, vectors

RMS = SiteSpec(streams=4, branch_norm="rms", branch_eps=1e-6)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(spec: SiteSpec, op: str) -> list[int]:
    return [form.rows for form in forms(spec) if form.op == op]


@pytest.mark.interpreted
@pytest.mark.parametrize("whole", [True, False], ids=["one launch", "scan and mix"])
@pytest.mark.parametrize(("kind", "weighed", "shifted"), NORMS)
def test_outputs_and_gradients_follow_float64(
    kind: str, weighed: bool, shifted: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "one_launch", lambda *_: whole)
    spec, tensors = random_site("identity", 2, (19, 200))
    spec, affine = normed(spec, kind), vectors(200, weighed, shifted)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    check(run(spec, tensors, affine, torch.float32, "triton"), truth)


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "n"), [("none", 2), ("sinkhorn", 3), ("kronecker", 4)])
def test_other_constraints_follow_float64(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (5, 49), iters=3)
    spec, affine = normed(spec, "layer"), vectors(49, True, True)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    check(run(spec, tensors, affine, torch.float32, "triton"), truth)


@pytest.mark.interpreted
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_half_streams_are_rounded_where_the_norm_does_it(kind: str, rounds: bool) -> None:
    spec, tensors = random_site("identity", 2, (19, 72))
    spec, affine = normed(spec, kind, branch_rounds=rounds), vectors(72, True, True)
    ours, plain = (
        run(spec, tensors, affine, torch.bfloat16, kernels)["y"]
        for kernels in ("triton", "reference")
    )
    assert (ours == plain).float().mean() > 0.999


@pytest.mark.interpreted
def test_two_runs_give_bitwise_the_same() -> None:
    spec, tensors = random_site("identity", 2, (140, 24))
    spec, affine = normed(spec, "layer"), vectors(24, True, True)
    first, second = (run(spec, tensors, affine, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    check(first, run(spec, tensors, affine, torch.float64, "reference"))


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_branch_input_costs_no_row_and_nothing_races(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels.triton.meter import Meter  # imports the interpreter

    spec, tensors = random_site("identity", 4, (19, 264))
    spec = normed(spec, kind)
    X, f, phi, bias, alpha, h_post, h_res, dy, dX_next, dh_post, dh_res = (
        t.float() for t in tensors
    )
    X, f, dy, dX_next = (t.bfloat16() for t in (X, f, dy, dX_next))
    given = (X, f, h_post, h_res, phi, bias, alpha, torch.ones(264), torch.zeros(264))
    text = replace(spec, kernels="triton").encode()
    row = 19 * 264 * 2
    for whole, rows in zip((True, False), rows_of(spec, "seam_norm"), strict=True):
        monkeypatch.setattr(site, "one_launch", lambda *_, whole=whole: whole)
        with Meter() as meter:
            *_, saved, statistics = OPS.seam_norm(*given, text)
        meter.check()
        assert _stream_bytes(spec, meter) == rows * row
    grads, back = (dX_next, dy, dh_post, dh_res), "seam_norm_backward"
    with Meter() as meter:
        OPS.seam_norm_backward(*grads, *given, saved, statistics, text)
    meter.check()
    assert [_stream_bytes(spec, meter)] == [rows * row for rows in rows_of(spec, back)]


def _stream_bytes(spec: SiteSpec, meter: object) -> int:
    from tests.kernels.triton.forms import stream_bytes  # imports the interpreter

    return stream_bytes(spec, meter)  # type: ignore[arg-type]


def test_rows_of_four_streams_are_those_of_a_seam() -> None:
    assert rows_of(RMS, "seam_norm") == rows_of(RMS, "seam") == [10, 14]
    assert rows_of(RMS, "seam_norm_backward") == rows_of(RMS, "seam_backward") == [26]


def test_sites_without_a_norm_have_no_kernel_of_it() -> None:
    plain = RMS.without_norm
    assert not [name for name in kernels(plain) if "norm" in name]
    assert "by_vectors" not in source(plain, torch.float32)


def spilling(spec: SiteSpec, channels: int, target: str, names: str = "norm") -> list[str]:
    """Which of the kernels whose names hold ``names`` spill registers, or compute in bf16."""
    module = load(source(spec, torch.bfloat16))
    found = [
        kernel_stats(getattr(module, variant[0]), variant, target)
        for variant in aot_variants(spec, torch.bfloat16, channels, target)
        if names in variant[0]
    ]
    assert found
    return [each.kernel for each in found if each.spills or each.bf16_arithmetic]


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("channels", [1280, 7168])
def test_no_kernel_with_a_norm_spills_on_any_target(channels: int, kind: str, target: str) -> None:
    assert spilling(replace(RMS, branch_norm=kind), channels, target) == []


def test_the_largest_kernel_with_a_norm_fits_the_registers_of_a_gpu() -> None:
    assert spilling(RMS, 1280, "sm_90", "seam_norm_backward_streams") == []
