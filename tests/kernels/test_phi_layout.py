"""phi as the transpose of what lies in memory, like a weight of ``nn.Linear``: the same bits."""

from typing import Any

import pytest
import torch

from mhc_compile.kernels.layout import is_by_output
from tests.kernels.cpp_runs import OPS, check, random_site, run_halves, run_seam


def by_output(phi: torch.Tensor) -> torch.Tensor:
    return phi.t().contiguous().t()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("run", [run_halves, run_seam])
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 4), ("none", 2), ("identity", 3)])
def test_either_layout_gives_the_same_bits(run: Any, name: str, n: int, channels: int) -> None:
    spec, tensors = random_site(name, n, (21, channels))
    turned = [by_output(t) if i == 2 else t for i, t in enumerate(tensors)]
    plain = run(spec, tensors, torch.float32, "cpp")
    found = run(spec, turned, torch.float32, "cpp")
    assert all(torch.equal(found[x], plain[x]) for x in plain)
    # The products of the reference are torch's, which may add in another order.
    check(run(spec, turned, torch.float32, "reference"), plain)


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
def test_gradients_of_phi_come_in_its_own_layout(kernels: str) -> None:
    spec, tensors = random_site("sinkhorn", 4, (7, 33), kernels=kernels)
    X, f, phi, bias, alpha, h_post, h_res, du, dX, dh_post, dh_res = (t.float() for t in tensors)
    phi, text = by_output(phi), spec.encode()
    *_, saved = OPS.pre(X, phi, bias, alpha, text)
    pre = (du, dh_post, dh_res, X, phi, bias, alpha, saved, text)
    torch.library.opcheck(OPS.pre_backward.default, pre)
    assert is_by_output(OPS.pre_backward(*pre)[1])
    seam = (dX, du, dh_post, dh_res, X, f, h_post, h_res, phi, bias, alpha, saved, text)
    torch.library.opcheck(OPS.seam_backward.default, seam)
    assert is_by_output(OPS.seam_backward(*seam)[4])
    dz = OPS.pre_backward_dz(*pre)[1]
    later = (dz, X, None, None, None, phi, text)
    torch.library.opcheck(OPS.phi_backward.default, later)
    assert torch.equal(OPS.phi_backward(*later), OPS.pre_backward(*pre)[1])


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
def test_a_learned_collapse_takes_either_layout(kernels: str) -> None:
    spec, tensors = random_site("sinkhorn", 4, (9, 40), kernels=kernels)
    X, phi, bias = tensors[0].float(), tensors[2][:, :4].float(), tensors[3][:4].float()
    head = (bias, torch.ones(1), spec.encode())
    phi = phi.contiguous()
    dx = OPS.collapse(X, phi, *head[:2], "learned", head[2])
    plain = OPS.collapse_backward(dx, X, phi, *head)
    torch.library.opcheck(OPS.collapse_backward.default, (dx, X, by_output(phi), *head))
    found = OPS.collapse_backward(dx, X, by_output(phi), *head)
    assert is_by_output(found[1])
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
