"""Backward ops in parts: together they give what the whole op gives, by every kind of kernel."""

from typing import Any

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import OPS, SITES, TOLERANCE, random_site

Given = dict[str, Any]


def given(
    spec: SiteSpec, tensors: list[torch.Tensor], dtype: torch.dtype, kernels: str
) -> tuple[Given, Given]:
    """Arguments of the backward of pre, with what else X gets, and of that of the seam."""
    text = f"{spec.encode()} kernels={kernels}"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    X, f, du, dX_next = (tensors[i].to(dtype) for i in (0, 1, 7, 8))
    phi, bias, alpha, h_post, h_res, dh_post, dh_res = (
        None if tensors[i] is None else tensors[i].to(wide) for i in (2, 3, 4, 5, 6, 9, 10)
    )
    site = {"phi": phi, "bias": bias, "alpha": alpha}
    of_pre = {"du": du, "dh_post": dh_post, "dh_res": dh_res, "X": X, **site}
    of_pre |= {"saved": OPS.pre(X, phi, bias, alpha, text)[3], "spec": text, "dX_more": dX_next}
    before = {"X": X, "f": f, "h_post": h_post, "h_res": h_res}
    of_seam = {"dX_next": dX_next, "du": du, "dh_post_next": dh_post, "dh_res_next": dh_res}
    saved = OPS.seam(*before.values(), phi, bias, alpha, text)[4]
    return of_pre, {**of_seam, **before, **site, "saved": saved, "spec": text}


def in_parts(of: Given) -> list[torch.Tensor]:
    """The results of a whole op from those of its parts."""
    seam = "f" in of
    *others, dz, dbias, dalpha = (OPS.seam_backward_dz if seam else OPS.pre_backward_dz)(**of)
    before = (of["f"], of["h_post"], of["h_res"]) if seam else (None, None, None)
    dphi = OPS.phi_backward(dz, of["X"], *before, of["phi"], of["spec"])
    return [*others, dphi, dbias, dalpha]


def post_arguments(of_seam: Given) -> Given:
    """Arguments of the backward of post, from those of a seam."""
    names = ("X", "f", "h_post", "h_res", "spec")
    return {"dY": of_seam["dX_next"], **{name: of_seam[name] for name in names}}


def post_in_parts(of: Given) -> list[torch.Tensor]:
    """The results of the backward of post from those of its parts."""
    df = OPS.post_backward_branch(of["dY"], of["h_post"], of["f"].dtype, of["spec"])
    dX, *mappings = OPS.post_backward_state(**of)
    return [dX, df, *mappings]


def same_bits(spec: SiteSpec, tensors: list[torch.Tensor], dtype: torch.dtype, kind: str) -> None:
    of_pre, of_seam = given(spec, tensors, dtype, kind)
    of_post = post_arguments(of_seam)
    pairs = [(post_in_parts(of_post), OPS.post_backward(**of_post))]
    if spec.dynamic:
        pairs.append((in_parts(of_pre), OPS.pre_backward(**of_pre)))
        pairs.append((in_parts(of_seam), OPS.seam_backward(**of_seam)))
    for parts, whole in pairs:
        for found, wanted in zip(parts, whole, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_the_generated_parts_of_every_constraint_give_the_bits_of_the_whole(
    name: str, n: int, channels: int
) -> None:
    spec, tensors = random_site(name, n, (2, 17, channels))
    same_bits(spec, tensors, torch.float32, "cpp")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 48), (1, 16), (16, 64), (70, 200), (33, 512)])
def test_generated_parts_give_the_bits_of_the_whole_at_every_size(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    spec, tensors = random_site("sinkhorn", 4, shape)
    same_bits(spec, tensors, dtype, "cpp")


@pytest.mark.parametrize("dim", [-3, -2])
def test_the_stream_axis_may_lie_elsewhere(dim: int) -> None:
    spec, tensors = random_site("sinkhorn", 3, (2, 16, 5, 3), dim=dim)
    same_bits(spec, tensors, torch.float32, "cpp")
    same_bits(spec, tensors, torch.float32, "reference")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", ["cpp", "reference"])
@pytest.mark.parametrize("name", ["sinkhorn", "identity", "none"])
def test_a_static_site_has_a_post_in_parts(name: str, kind: str) -> None:
    spec, tensors = random_site(name, 4, (37, 50), dynamic=False)
    same_bits(spec, tensors, torch.float32, kind)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_tokens_as_in_the_whole(threads: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_bits(spec, tensors, torch.float32, "cpp")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "n"), SITES)
def test_the_parts_of_the_reference_give_the_bits_of_the_whole(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (2, 5, 7))
    same_bits(spec, tensors, torch.float64, "reference")


@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 4), ("none", 2)])
def test_dz_is_the_gradient_of_the_products(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (9, 48))
    (truth, _), (ours, _) = (
        given(spec, tensors, dtype, kind)
        for dtype, kind in ((torch.float64, "reference"), (torch.float32, "cpp"))
    )
    exact, found = (OPS.pre_backward_dz(**of)[1] for of in (truth, ours))
    width = tensors[3].numel()
    assert found.shape == exact.shape == (9, exact.shape[1])
    assert exact.shape[1] % 4 == 0
    assert (found - exact)[:, :width].norm() <= TOLERANCE * exact[:, :width].norm()


def test_parts_pass_opcheck(constraint: str) -> None:
    spec, tensors = random_site(constraint, 4, (2, 3, 5))
    of_pre, of_seam = given(spec, tensors, torch.float32, "reference")
    for of, op in ((of_pre, OPS.pre_backward_dz), (of_seam, OPS.seam_backward_dz)):
        torch.library.opcheck(op.default, tuple(of.values()))
        dz = op(**of)[-3]
        before = tuple(of.get(name) for name in ("f", "h_post", "h_res"))
        arguments = (dz, of["X"], *before, of["phi"], of["spec"])
        torch.library.opcheck(OPS.phi_backward.default, arguments)
    of = post_arguments(of_seam)
    torch.library.opcheck(OPS.post_backward_state.default, tuple(of.values()))
    arguments = (of["dY"], of["h_post"], torch.bfloat16, of["spec"])
    torch.library.opcheck(OPS.post_backward_branch.default, arguments)


def test_a_static_site_has_no_phi() -> None:
    spec, tensors = random_site("sinkhorn", 2, (3, 8), dynamic=False)
    of_pre, _ = given(spec, tensors, torch.float32, "reference")
    of_pre |= {"phi": torch.zeros(16, 8), "alpha": torch.ones(3)}
    with pytest.raises(KernelError, match="static"):
        OPS.pre_backward_dz(**of_pre)


def test_half_a_seam_and_another_width_of_dz_are_refused() -> None:
    spec, tensors = random_site("sinkhorn", 2, (3, 8))
    of, _ = given(spec, tensors, torch.float32, "reference")
    dz = OPS.pre_backward_dz(**of)[1]
    with pytest.raises(KernelError, match="all or none"):
        OPS.phi_backward(dz, of["X"], tensors[1], None, None, of["phi"], of["spec"])
    with pytest.raises(KernelError, match="dz"):
        OPS.phi_backward(dz[:, :-1], of["X"], None, None, None, of["phi"], of["spec"])
