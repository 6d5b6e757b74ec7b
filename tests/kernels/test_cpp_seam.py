"""The generated C++ of a seam against the reference in float64: outputs and every gradient."""

import pytest
import torch

from tests.kernels.cpp_runs import SEAM, SITES, TOLERANCE, check, errors, random_site, run_seam


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [16, 129, 200])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 70])
def test_every_shape_agrees_with_float64_and_is_written_whole(tokens: int, channels: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (tokens, channels))
    truth = run_seam(spec, tensors, torch.float64, "reference")
    ours = run_seam(spec, tensors, torch.float32, "cpp")
    assert set(ours) == set(SEAM)
    check(ours, truth)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_every_constraint_agrees_with_float64(name: str, n: int, channels: int) -> None:
    spec, tensors = random_site(name, n, (2, 17, channels))
    truth = run_seam(spec, tensors, torch.float64, "reference")
    check(run_seam(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.parametrize("channels", [64, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_only_carry_the_rounding_of_the_outputs(
    dtype: torch.dtype, channels: int
) -> None:
    spec, tensors = random_site("sinkhorn", 4, (37, channels))
    for i in (0, 1, 7, 8):
        tensors[i] = tensors[i].to(dtype).double()
    truth = run_seam(spec, tensors, torch.float64, "reference", rounding=dtype)
    found = errors(run_seam(spec, tensors, dtype, "cpp"), truth)
    # Gradients are summed before they are rounded: dX once, though it comes by four ways.
    for x in ("next", "u", "dX", "df"):
        rounding = (truth[x].to(dtype) - truth[x]).norm() / truth[x].norm()
        assert found[x] <= 1.01 * float(rounding), (x, found)
    for x in ("h_post", "h_res", "dh_post", "dh_res", "dphi", "dbias", "dalpha"):
        assert found[x] <= TOLERANCE, (x, found)


@pytest.mark.parametrize("logits", [1.0, 4.0, 8.0, 30.0])
def test_large_logits_are_as_accurate_as_in_the_reference(logits: float) -> None:
    spec, tensors = random_site("sinkhorn", 4, (20, 48), logits)
    truth = run_seam(spec, tensors, torch.float64, "reference")
    ours = errors(run_seam(spec, tensors, torch.float32, "cpp"), truth)
    plain = errors(run_seam(spec, tensors, torch.float32, "reference"), truth)
    assert all(ours[x] <= max(TOLERANCE, 2 * plain[x]) for x in SEAM), (ours, plain)


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e15])
@pytest.mark.parametrize(("name", "n"), [site for site in SITES if site[1] == 4])
def test_equal_states_of_any_size_give_no_nan(name: str, n: int, fill: float) -> None:
    spec, tensors = random_site(name, n, (5, 48))
    tensors[0].fill_(fill)
    tensors[1].fill_(fill)
    ours = run_seam(spec, tensors, torch.float32, "cpp")
    assert all(t.isfinite().all() for t in ours.values())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_two_runs_on_as_many_threads_give_bitwise_the_same(threads: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run_seam(spec, tensors, torch.float32, "cpp") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in SEAM)
    check(first, run_seam(spec, tensors, torch.float64, "reference"))


def test_only_sums_over_tokens_depend_on_the_number_of_threads() -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(run_seam(spec, tensors, torch.float32, "cpp"))
    finally:
        torch.set_num_threads(before)
    of_tokens = set(SEAM) - {"dphi", "dbias", "dalpha"}
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in of_tokens)


def test_streamed_results_equal_stored_ones() -> None:
    # From 2^20 elements on, states are written past the caches.
    spec, tensors = random_site("sinkhorn", 4, (2048, 128))
    few = [t if i in (2, 3, 4) else t[:16] for i, t in enumerate(tensors)]
    large = run_seam(spec, tensors, torch.float32, "cpp")
    small = run_seam(spec, few, torch.float32, "cpp")
    assert all(torch.equal(large[name][:16], small[name]) for name in ("next", "u", "dX", "df"))


def test_a_nan_stays_with_its_token() -> None:
    spec, tensors = random_site("sinkhorn", 4, (20, 48))
    clean = run_seam(spec, tensors, torch.float32, "cpp")
    tensors[0][3, 1, 5] = torch.nan
    found = run_seam(spec, tensors, torch.float32, "cpp")
    others = torch.arange(20) != 3
    for x in ("next", "u", "h_post", "h_res", "dX", "df", "dh_post", "dh_res"):
        assert found[x][3].isnan().any()
        assert torch.equal(found[x][others], clean[x][others])
    assert found["dphi"].isnan().any()


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [16, 48, 64, 129, 200, 512, 1280, 2560])
@pytest.mark.parametrize("tokens", range(1, 71, 2))
def test_every_shape_of_the_grid_agrees_with_float64(tokens: int, channels: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (tokens, channels))
    truth = run_seam(spec, tensors, torch.float64, "reference")
    ours = run_seam(spec, tensors, torch.float32, "cpp")
    # Each of the three is one sum over all tokens, of terms as large as those of the bias; where
    # they happen to cancel, an error relative to what is left of them says nothing.
    scale = max(truth["dalpha"].norm(), truth["dbias"].norm())
    alpha_error = (ours.pop("dalpha") - truth.pop("dalpha")).norm() / scale
    assert alpha_error <= TOLERANCE
    check(ours, truth)
