"""What else the generated C++ runs: static mappings, any layout, heads, Sinkhorn alone."""

import pytest
import torch

from mhc_compile.kernels.cpp.call import streams_last
from mhc_compile.kernels.cpp.select import parts
from mhc_compile.kernels.spec import EPS_PLACES, SiteSpec
from tests.kernels.cpp_runs import (
    OPS,
    Results,
    check,
    errors,
    random_site,
    run_collapse,
    run_halves,
    run_seam,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 4), ("identity", 4), ("none", 3)])
def test_static_mappings_agree_with_float64(name: str, n: int, tokens: int) -> None:
    spec, tensors = random_site(name, n, (tokens, 50), dynamic=False)
    for run in (run_halves, run_seam):
        truth = run(spec, tensors, torch.float64, "reference")
        check(run(spec, tensors, torch.float32, "cpp"), truth)


def test_gradients_of_static_mappings_stay_accurate_over_many_tokens() -> None:
    spec, tensors = random_site("sinkhorn", 2, (20_000, 16), dynamic=False)
    truth = run_halves(spec, tensors, torch.float64, "reference")
    check(run_halves(spec, tensors, torch.float32, "cpp"), truth, 2e-6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_channels_on_another_axis_agree_with_float64(dynamic: bool) -> None:
    spec, tensors = random_site("sinkhorn", 4, (2, 50, 3, 5), dim=-3, dynamic=dynamic)
    for run in (run_halves, run_seam, run_collapse):
        truth = run(spec, tensors, torch.float64, "reference")
        ours = run(spec, tensors, torch.float32, "cpp")
        check(ours, truth)
        assert all(t.is_contiguous() for t in ours.values())


def test_a_state_whose_channels_are_innermost_in_memory_is_not_copied() -> None:
    X = torch.randn(2, 3, 5, 4, 50).permute(0, 3, 4, 1, 2)  # [B, n, C, H, W]
    rows = streams_last(X, SiteSpec(streams=4, dim=-3))
    assert rows.shape == (2, 3, 5, 4, 50)
    assert rows.data_ptr() == X.data_ptr()


@pytest.mark.parametrize("n", [1, 9])
def test_other_numbers_of_streams_agree_with_float64(n: int) -> None:
    spec, tensors = random_site("sinkhorn", n, (19, 50))
    for run in (run_halves, run_seam):
        truth = run(spec, tensors, torch.float64, "reference")
        check(run(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n"),
    [("sinkhorn", 16), ("sinkhorn_softmax", 12), ("sinkhorn_exp", 9), ("none", 10),
     ("identity", 16), ("identity", 1), ("kronecker", 16), ("orthogonal", 9), ("orthogonal", 16),
     ("permutations", 5), ("none", 1), ("permutations", 1), ("orthogonal", 1), ("kronecker", 1)],
)  # fmt: skip
def test_any_number_of_streams_agrees_with_float64(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (19, 50))
    for run in (run_halves, run_seam):
        truth = run(spec, tensors, torch.float64, "reference")
        check(run(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (2, 17, 129)])
def test_a_learned_collapse_agrees_with_float64(shape: tuple[int, ...], dynamic: bool) -> None:
    spec, tensors = random_site("sinkhorn", 4, shape, dynamic=dynamic)
    truth = run_collapse(spec, tensors, torch.float64, "reference")
    check(run_collapse(spec, tensors, torch.float32, "cpp"), truth)


def test_a_learned_collapse_of_half_streams_is_rounded_once() -> None:
    spec, tensors = random_site("sinkhorn", 4, (37, 129))
    for i in (0, 7):
        tensors[i] = tensors[i].bfloat16().double()
    truth = run_collapse(spec, tensors, torch.float64, "reference")
    found = errors(run_collapse(spec, tensors, torch.bfloat16, "cpp"), truth)
    for x in ("x", "dX"):
        rounding = (truth[x].bfloat16() - truth[x]).norm() / truth[x].norm()
        assert found[x] <= 1.01 * float(rounding), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_softmax"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 35)])
def test_sinkhorn_alone_agrees_with_float64(
    shape: tuple[int, ...], name: str, dtype: torch.dtype
) -> None:
    spec, _ = random_site(name, 4, (1, 16))
    generator = torch.Generator().manual_seed(0)
    logits, grad = (
        torch.randn(*shape, 4, 4, generator=generator).to(dtype).double() for _ in range(2)
    )
    truth = _run_sinkhorn(spec, logits, grad, torch.float64, "reference")
    ours = _run_sinkhorn(spec, logits, grad, dtype, "cpp")
    assert all(t.dtype == dtype for t in ours.values())
    check(ours, truth, 1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("iters", [1, 5, 20])
@pytest.mark.parametrize("place", EPS_PLACES)
def test_every_place_of_eps_agrees_with_float64(place: str, iters: int) -> None:
    spec = SiteSpec(
        streams=3, constraint="sinkhorn_exp", iters=iters, sinkhorn_eps=0.1, eps_at=place
    )
    generator = torch.Generator().manual_seed(0)
    logits, grad = torch.randn(2, 37, 3, 3, generator=generator)
    logits = 3.0 * logits - 2.0  # some sums are below eps, so that the floor is felt
    truth = _run_sinkhorn(spec, logits, grad, torch.float64, "reference")
    check(_run_sinkhorn(spec, logits, grad, torch.float32, "cpp"), truth, 2e-6)


@pytest.mark.parametrize("place", EPS_PLACES)
@pytest.mark.parametrize("logit", [100.0, torch.nan])
def test_logits_that_overflow_show_and_stay_with_their_token(logit: float, place: str) -> None:
    spec = SiteSpec(streams=3, constraint="sinkhorn_exp", iters=5, sinkhorn_eps=0.1, eps_at=place)
    logits, grad = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    logits[1, 1, 1] = logit
    for found in _run_sinkhorn(spec, logits, grad, torch.float32, "cpp").values():
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


def _run_sinkhorn(
    spec: SiteSpec, logits: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, kernels: str
) -> Results:
    leaf = logits.to(dtype).requires_grad_()
    out = OPS.sinkhorn(leaf, f"{spec.encode()} kernels={kernels}")
    (back,) = torch.autograd.grad(out, leaf, grad.to(dtype))
    return {"out": out.detach(), "grad": back}


def test_every_half_is_read_and_written_right() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    X = every[every.isfinite()].reshape(-1, 1, 1024)
    text = SiteSpec(streams=1, kernels="cpp").encode()
    assert torch.equal(OPS.collapse(X, None, None, None, "sum", text), X[:, 0])
    # Sums of two that lie between halves, overflow or are subnormal are rounded as torch rounds.
    shuffled = X.flatten()[torch.randperm(X.numel(), generator=torch.Generator().manual_seed(0))]
    pairs = torch.stack((X.flatten(), shuffled)).reshape(2, -1, 1024).transpose(0, 1)
    text = SiteSpec(streams=2, kernels="cpp").encode()
    expected = pairs.float().sum(1).half()
    assert torch.equal(OPS.collapse(pairs, None, None, None, "sum", text), expected)


@pytest.mark.parametrize(
    ("op", "dynamic", "learned", "needed"),
    [
        ("mhc::pre", True, True, ("site",)),
        ("mhc::seam_backward", True, True, ("site",)),
        ("mhc::pre_backward", False, True, ("ends",)),
        ("mhc::post", False, True, ("site",)),
        ("mhc::seam", False, True, ("ends", "site")),
        ("mhc::collapse", True, False, ("ends",)),
        ("mhc::collapse", False, True, ("ends",)),
        ("mhc::collapse_backward", True, True, ("head",)),
        ("mhc::sinkhorn", True, False, ("sinkhorn",)),
    ],
)
def test_only_what_an_op_needs_is_built(
    op: str, dynamic: bool, learned: bool, needed: tuple[str, ...]
) -> None:
    assert parts(op, SiteSpec(streams=2, dynamic=dynamic), learned) == needed
