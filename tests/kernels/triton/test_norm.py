"""The generated Triton of ``mhc::seam_norm``: interpreted against float64, bytes, registers."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import site
from mhc_compile.kernels.triton.emit import kernels, source
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


@pytest.mark.interpreted
@pytest.mark.parametrize("whole", [True, False], ids=["one launch", "scan and mix"])
@pytest.mark.parametrize(("kind", "weighed", "shifted"), NORMS)
def test_outputs_and_gradients_follow_float64(
    kind: str, weighed: bool, shifted: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "one_launch", lambda *_: whole)
    spec, tensors = random_site("sinkhorn", 3, (19, 200), iters=3)
    spec, affine = normed(spec, kind), vectors(200, weighed, shifted)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    check(run(spec, tensors, affine, torch.float32, "triton"), truth)


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "n"), [("none", 2), ("identity", 4), ("kronecker", 8)])
def test_other_constraints_follow_float64(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (5, 129))
    spec, affine = normed(spec, "layer"), vectors(129, True, True)
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
    spec, tensors = random_site("identity", 2, (300, 48))
    spec, affine = normed(spec, "layer"), vectors(48, True, True)
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
    expected = {form.op: [] for form in forms(spec)}
    for form in forms(spec):
        expected[form.op].append(form.rows * row)
    for whole, forward in zip((True, False), expected["seam_norm"], strict=True):
        monkeypatch.setattr(site, "one_launch", lambda *_, whole=whole: whole)
        with Meter() as meter:
            *_, saved, statistics = OPS.seam_norm(*given, text)
        meter.check()
        assert _stream_bytes(spec, meter) == forward
    grads = (dX_next, dy, dh_post, dh_res)
    with Meter() as meter:
        OPS.seam_norm_backward(*grads, *given, saved, statistics, text)
    meter.check()
    assert [_stream_bytes(spec, meter)] == expected["seam_norm_backward"]


def _stream_bytes(spec: SiteSpec, meter: object) -> int:
    from tests.kernels.triton.forms import stream_bytes  # imports the interpreter

    return stream_bytes(spec, meter)  # type: ignore[arg-type]


def test_rows_of_four_streams_are_those_of_a_seam() -> None:
    rows = {form.op: [] for form in forms(RMS)}
    for form in forms(RMS):
        rows[form.op].append(form.rows)
    assert (rows["seam_norm"], rows["seam_norm_backward"]) == ([10, 14], [26])
    assert (rows["seam"], rows["seam_backward"]) == ([10, 14], [26])


def test_sites_without_a_norm_have_no_kernel_of_it() -> None:
    plain = RMS.without_norm
    assert not [name for name in kernels(plain) if "norm" in name]
    assert "by_vectors" not in source(plain, torch.float32)
