"""The generated C++ against the reference in float64: outputs and every gradient."""

import itertools
import os

import pytest
import torch

from tests.kernels.cpp_runs import (
    HALVES,
    OPS,
    SITES,
    TOLERANCE,
    check,
    errors,
    random_site,
    run_halves,
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [16, 48, 64, 129, 200, 512])
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_every_shape_agrees_with_float64_and_is_written_whole(tokens: int, channels: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (tokens, channels))
    truth = run_halves(spec, tensors, torch.float64, "reference")
    check(run_halves(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_every_constraint_agrees_with_float64(name: str, n: int, channels: int) -> None:
    spec, tensors = random_site(name, n, (2, 17, channels))
    truth = run_halves(spec, tensors, torch.float64, "reference")
    check(run_halves(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        *itertools.product(("sinkhorn", "sinkhorn_softmax"), (1.0, 4.0, 8.0, 30.0)),
        ("sinkhorn_exp", 8.0),
        ("sinkhorn_exp", 16.0),  # at 30 its exp overflows
    ],
)
def test_large_logits_are_as_accurate_as_in_the_reference(name: str, logits: float) -> None:
    for seed in range(3):
        spec, tensors = random_site(name, 4, (20, 48), logits, seed)
        truth = run_halves(spec, tensors, torch.float64, "reference")
        ours = errors(run_halves(spec, tensors, torch.float32, "cpp"), truth)
        plain = errors(run_halves(spec, tensors, torch.float32, "reference"), truth)
        assert all(ours[x] <= max(TOLERANCE, 2 * plain[x]) for x in HALVES), (ours, plain)


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e15])
@pytest.mark.parametrize(("name", "n"), [site for site in SITES if site[1] == 4])
def test_equal_states_of_any_size_agree_and_are_finite(name: str, n: int, fill: float) -> None:
    spec, tensors = random_site(name, n, (5, 48))
    tensors[0].fill_(fill)
    tensors[3].fill_(1.0)
    truth = run_halves(spec, tensors, torch.float64, "reference")
    ours = run_halves(spec, tensors, torch.float32, "cpp")
    assert all(t.isfinite().all() for t in ours.values())
    forward = {name: error for name, error in errors(ours, truth).items() if name[0] != "d"}
    assert all(error <= TOLERANCE for error in forward.values()), forward


def test_a_row_of_vanishing_logits_is_no_division_by_zero() -> None:
    spec, tensors = random_site("sinkhorn", 4, (5, 48))
    tensors[3][8:12] = -300.0
    tensors[4].fill_(0.1)
    truth = run_halves(spec, tensors, torch.float64, "reference")
    ours = run_halves(spec, tensors, torch.float32, "cpp")
    assert all(t.isfinite().all() for t in ours.values())
    assert errors(ours, truth)["h_res"] <= 1e-4  # logits of 300 carry an error of 3e-5 each


@pytest.mark.parametrize("channels", [64, 129])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sinkhorn", torch.bfloat16), ("none", torch.bfloat16), ("sinkhorn", torch.float16)],
)
def test_half_streams_only_carry_the_rounding_of_the_outputs(
    name: str, dtype: torch.dtype, channels: int
) -> None:
    spec, tensors = random_site(name, 4, (37, channels))
    for i in (0, 1, 7, 8):
        tensors[i] = tensors[i].to(dtype).double()
    # The coefficients that post reads are float32 in both; everything inside is float32 too.
    truth = run_halves(spec, tensors, torch.float64, "reference")
    ours = run_halves(spec, tensors, dtype, "cpp")
    found = errors(ours, truth)
    for x in ("u", "next", "df"):
        rounding = (truth[x].to(dtype) - truth[x]).norm() / truth[x].norm()
        assert found[x] <= 1.01 * float(rounding), (x, found)
    for x in ("h_post", "h_res", "dphi", "dbias", "dalpha"):
        assert found[x] <= TOLERANCE, (x, found)
    assert found["dX"] <= 8e-3  # three roundings: pre's, post's, and of their sum


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_collapse_is_rounded_once(mode: str, n: int, channels: int, dtype: torch.dtype) -> None:
    spec, tensors = random_site("sinkhorn", n, (2, 17, channels))
    X = tensors[0].to(dtype)
    text = f"{spec.encode()} kernels="
    exact = OPS.collapse(X.double(), None, None, None, mode, text + "reference")
    ours = OPS.collapse(X, None, None, None, mode, text + "cpp")
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_bitwise_the_same(threads: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run_halves(spec, tensors, torch.float32, "cpp") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in HALVES)
    truth = run_halves(spec, tensors, torch.float64, "reference")
    check(first, truth)


@pytest.mark.parametrize(("name", "n"), [site for site in SITES if site[1] == 4])
def test_a_nan_stays_visible_and_stays_with_its_token(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (20, 48))
    clean = run_halves(spec, tensors, torch.float32, "cpp")
    tensors[0][3, 1, 5] = torch.nan
    found = run_halves(spec, tensors, torch.float32, "cpp")
    plain = run_halves(spec, tensors, torch.float32, "reference")
    others = torch.arange(20) != 3
    for x in ("u", "next"):
        assert torch.equal(found[x].isnan(), plain[x].isnan())
        assert torch.equal(found[x][others], clean[x][others])
    assert found["dphi"].isnan().any()


def test_any_strides_are_read_right() -> None:
    spec, tensors = random_site("sinkhorn", 4, (6, 48))
    straight = run_halves(spec, tensors, torch.float32, "cpp")
    turned = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors[:9]]
    assert not turned[0].is_contiguous()
    bent = run_halves(spec, turned, torch.float32, "cpp")
    assert all(torch.equal(straight[name], bent[name]) for name in HALVES)


def test_streamed_results_equal_stored_ones() -> None:
    # From 2^20 elements on, states are written past the caches.
    spec, tensors = random_site("sinkhorn", 4, (2048, 128))
    few = [t[:16] if i in (0, 1, 7, 8) else t for i, t in enumerate(tensors)]
    large = run_halves(spec, tensors, torch.float32, "cpp")
    small = run_halves(spec, few, torch.float32, "cpp")
    assert all(torch.equal(large[name][:16], small[name]) for name in ("next", "dX", "u"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_the_same() -> None:
    spec, tensors = random_site("sinkhorn", 4, (20, 48))
    expected = run_halves(spec, tensors, torch.float32, "cpp")
    child = os.fork()
    if child == 0:
        same = False
        try:
            torch.set_num_threads(1)
            again = run_halves(spec, tensors, torch.float32, "cpp")
            same = all(torch.equal(again[name], expected[name]) for name in HALVES)
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
