"""``mhc::seam_norm``: a seam and the norm of its branch, in one op, against torch's own norms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mhc_compile.errors import KernelError
from tests.kernels.cpp_runs import OPS, SITES, TOLERANCE, check, errors, random_site
from tests.kernels.norm_runs import NORMS, normed, run, vectors

MakeSite = Callable[..., Any]


@pytest.mark.parametrize(("kind", "weighed", "shifted"), NORMS)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 7), -1), ((2, 5, 3, 2), -3)])
def test_the_op_is_a_seam_and_a_norm(
    shape: tuple[int, ...], dim: int, kind: str, weighed: bool, shifted: bool
) -> None:
    spec, tensors = random_site("sinkhorn", 3, shape, dim=dim)
    spec, affine = normed(spec, kind), vectors(shape[dim], weighed, shifted)
    truth = run(spec, tensors, affine, torch.float64, "two ops")
    ours = run(spec, tensors, affine, torch.float64, "reference")
    check(ours, truth, 1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_finite_differences_confirm_its_gradients(
    make_site: MakeSite, constraint: str, kind: str
) -> None:
    site = make_site(constraint, 2, (2, 3), iters=5)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    mixes = h_res.requires_grad
    affine = [t.requires_grad_() for t in vectors(3, True, True) if t is not None]
    inputs = (site.X, site.f, h_post.detach().requires_grad_())
    inputs = (*inputs, h_res.detach().requires_grad_(mixes), *site.parameters, *affine)
    text = normed(site.spec, kind).encode()
    assert torch.autograd.gradcheck(
        lambda *tensors: OPS.seam_norm(*tensors, text)[: 4 if mixes else 3], inputs, fast_mode=True
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("kind", "weighed", "shifted"), NORMS)
@pytest.mark.parametrize("channels", [16, 129])
@pytest.mark.parametrize("tokens", [0, 1, 17, 70])
def test_generated_cpp_agrees_with_float64_and_writes_everything(
    tokens: int, channels: int, kind: str, weighed: bool, shifted: bool
) -> None:
    spec, tensors = random_site("sinkhorn", 4, (tokens, channels))
    spec, affine = normed(spec, kind), vectors(channels, weighed, shifted)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    check(run(spec, tensors, affine, torch.float32, "cpp"), truth)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        *(("none", 2), ("identity", 4), ("sinkhorn", 9)),
        *(pytest.param(*site, marks=pytest.mark.slow) for site in [*SITES, ("sinkhorn", 1)]),
    ],
)
def test_generated_cpp_of_every_constraint_agrees_with_float64(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (2, 17, 50))
    spec, affine = normed(spec, "layer"), vectors(50, True, True)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    check(run(spec, tensors, affine, torch.float32, "cpp"), truth)


def test_generated_cpp_takes_channels_on_another_axis() -> None:
    spec, tensors = random_site("sinkhorn", 4, (2, 50, 3, 5), dim=-3)
    spec, affine = normed(spec, "rms"), vectors(50, True, False)
    truth = run(spec, tensors, affine, torch.float64, "reference")
    ours = run(spec, tensors, affine, torch.float32, "cpp")
    check(ours, truth)
    assert all(t.is_contiguous() for t in ours.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_half_streams_only_carry_the_rounding_of_the_outputs(kind: str, dtype: torch.dtype) -> None:
    spec, tensors = random_site("sinkhorn", 4, (37, 129))
    for i in (0, 1, 7, 8):
        tensors[i] = tensors[i].to(dtype).double()
    spec, affine = normed(spec, kind), vectors(129, True, True, torch.float32)
    affine = [None if t is None else t.double() for t in affine]
    truth = run(spec, tensors, affine, torch.float64, "two ops", rounding=dtype)
    found = errors(run(spec, tensors, affine, dtype, "cpp"), truth)
    for x in ("next", "y", "dX", "df"):
        rounding = (truth[x].to(dtype) - truth[x]).norm() / truth[x].norm()
        assert found[x] <= 1.01 * float(rounding), (x, found)
    assert all(found[x] <= TOLERANCE for x in found if x not in ("next", "y", "dX", "df")), found


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_rounds_before_its_weight_does_so_in_every_kernel(kind: str) -> None:
    spec, tensors = random_site("sinkhorn", 4, (37, 129))
    affine = vectors(129, True, True)
    runs = {
        (kernels, rounds): run(
            normed(spec, kind, branch_rounds=rounds), tensors, affine, torch.bfloat16, kernels
        )["y"]
        for kernels in ("reference", "cpp")
        for rounds in (True, False)
    }
    for rounds in (True, False):
        same = runs["cpp", rounds] == runs["reference", rounds]
        assert same.float().mean() > 0.999  # sums are made in another order
    assert (runs["cpp", True] == runs["cpp", False]).float().mean() < 0.9


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_a_large_mean_costs_a_layer_norm_no_digits(mean: float, kernels: str) -> None:
    spec, tensors = random_site("identity", 4, (20, 50))
    spec = normed(spec, "layer")
    tensors[0] = (tensors[0] + mean).float().double()
    truth = run(spec, tensors, [None, None], torch.float64, "reference")
    ours = run(spec, tensors, [None, None], torch.float32, kernels)
    scale = 1 + mean  # digits that u itself loses
    assert errors(ours, truth)["y"] <= scale * 3e-7


@pytest.mark.parametrize("threads", [1, 3])
def test_two_runs_give_bitwise_the_same(threads: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    spec, affine = normed(spec, "layer"), vectors(96, True, True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run(spec, tensors, affine, torch.float32, "cpp") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    check(first, run(spec, tensors, affine, torch.float64, "reference"))


def test_the_state_and_mappings_are_bitwise_those_of_a_seam() -> None:
    spec, tensors = random_site("sinkhorn", 4, (35, 96))
    X, f, phi, bias, alpha, h_post, h_res = (t.float() for t in tensors[:7])
    text = normed(spec, "rms").encode()
    ours = OPS.seam_norm(X, f, h_post, h_res, phi, bias, alpha, None, None, text)
    plain = OPS.seam(X, f, h_post, h_res, phi, bias, alpha, spec.encode())
    assert all(torch.equal(ours[at], plain[at]) for at in (0, 2, 3, 4))


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
def test_phi_may_be_the_transpose_of_what_is_dense(kernels: str) -> None:
    spec, tensors = random_site("sinkhorn", 4, (35, 50))
    spec, affine = normed(spec, "rms"), vectors(50, True, False)
    plain = run(spec, tensors, affine, torch.float32, kernels)
    tensors[2] = tensors[2].t().contiguous().t()
    turned = run(spec, tensors, affine, torch.float32, kernels)
    assert turned["dphi"].stride(0) == 1
    check(turned, plain, 1e-6)


@pytest.mark.parametrize("affine", [(True, True), (False, False)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_op_and_its_backward_pass_opcheck(
    make_site: MakeSite, kind: str, affine: tuple[bool, bool]
) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5), iters=2, dtype=torch.float32)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    given = (site.X, site.f, h_post, h_res, *site.parameters, *vectors(5, *affine, torch.float32))
    plain = [None if t is None else t.detach() for t in given]
    leaves = [None if t is None else t.clone().requires_grad_() for t in plain]
    text = normed(site.spec, kind).encode()
    torch.library.opcheck(OPS.seam_norm.default, (*leaves, text))
    *grads, saved, statistics = OPS.seam_norm(*plain, text)
    arguments = (*grads, *plain, saved, statistics, text)
    torch.library.opcheck(OPS.seam_norm_backward.default, arguments)


def test_what_does_not_fit_is_refused(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5), requires_grad=False)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    seam = (site.X, site.f, h_post, h_res, *site.parameters)
    text = normed(site.spec, "rms").encode()
    with pytest.raises(KernelError, match="use mhc::seam"):
        OPS.seam_norm(*seam, None, None, site.text)
    with pytest.raises(KernelError, match="is for mhc::seam_norm"):
        OPS.seam(*seam, text)
    with pytest.raises(KernelError, match=r"weight has shape \(4,\)"):
        OPS.seam_norm(*seam, torch.ones(4), None, text)
    for fields in ({"single_pass": True}, {"dynamic": False}):
        with pytest.raises(KernelError, match="does not normalise its branch input"):
            OPS.seam_norm(*seam, None, None, normed(replace(site.spec, **fields), "rms").encode())
