"""torch's own checks of every op: schema, fake implementation, autograd registration, AOT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
MakeSite = Callable[..., Any]


@pytest.mark.parametrize("dynamic", [True, False])
def test_pre_and_its_backward_pass_opcheck(
    make_site: MakeSite, constraint: str, dynamic: bool
) -> None:
    site = make_site(constraint, 4, (2, 3, 5), dynamic=dynamic, iters=2, dtype=torch.float32)
    inputs = (site.X, *site.parameters)
    torch.library.opcheck(OPS.pre.default, (*inputs, site.text))
    u, h_post, h_res, saved = (t.detach() for t in OPS.pre(*inputs, site.text))
    plain = tuple(None if t is None else t.detach() for t in inputs)
    arguments = (u, h_post, h_res, *plain, saved, site.text)
    torch.library.opcheck(OPS.pre_backward.default, arguments)
    torch.library.opcheck(OPS.pre_backward.default, (*arguments, plain[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constraint_name", ["sinkhorn", "identity"])
def test_post_and_its_backward_pass_opcheck(
    make_site: MakeSite, constraint_name: str, dtype: torch.dtype
) -> None:
    site = make_site(constraint_name, 3, (2, 5, 3), dim=-2, dtype=dtype)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    inputs = [site.X, site.f, h_post.detach().requires_grad_(), h_res.detach()]
    torch.library.opcheck(OPS.post.default, (*inputs, site.text))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.post_backward.default, (plain[0], *plain, site.text))


@pytest.mark.parametrize("dynamic", [True, False])
def test_seam_and_its_backward_pass_opcheck(
    make_site: MakeSite, constraint: str, dynamic: bool
) -> None:
    site = make_site(constraint, 4, (2, 3, 5), dynamic=dynamic, iters=2, dtype=torch.float32)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    plain = [
        None if t is None else t.detach() for t in (site.X, site.f, h_post, h_res, *site.parameters)
    ]
    leaves = [None if t is None else t.clone().requires_grad_() for t in plain]
    torch.library.opcheck(OPS.seam.default, (*leaves, site.text))
    *grads, saved = OPS.seam(*plain, site.text)
    torch.library.opcheck(OPS.seam_backward.default, (*grads, *plain, saved, site.text))


@pytest.mark.parametrize("dim", [-1, -2])
def test_expand_and_its_backward_pass_opcheck(dim: int) -> None:
    torch.library.opcheck(OPS.expand.default, (torch.randn(2, 3, 5, requires_grad=True), 4, dim))
    torch.library.opcheck(OPS.expand_backward.default, (torch.randn(2, 3, 4, 5), -1))


@pytest.mark.parametrize("mode", ["mean", "sum", "learned", "static"])
def test_collapse_and_its_backward_pass_opcheck(make_site: MakeSite, mode: str) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5), dynamic=mode != "static", dtype=torch.float32)
    head: tuple[torch.Tensor | None, ...] = (None, None, None)
    if mode == "learned":
        head = (torch.randn(20, 4, requires_grad=True), torch.randn(4), torch.randn(1))
    if mode == "static":
        head, mode = (None, torch.randn(4, requires_grad=True), None), "learned"
    torch.library.opcheck(OPS.collapse.default, (site.X, *head, mode, site.text))
    if mode == "learned":
        plain = tuple(None if t is None else t.detach() for t in (site.f, site.X, *head))
        torch.library.opcheck(OPS.collapse_backward.default, (*plain, site.text))


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_softmax"])
def test_sinkhorn_and_its_backward_pass_opcheck(name: str) -> None:
    text = SiteSpec(streams=4, constraint=name, iters=2).encode()
    logits = torch.randn(3, 4, 4, requires_grad=True)
    torch.library.opcheck(OPS.sinkhorn.default, (logits, text))
    plain = logits.detach()
    torch.library.opcheck(OPS.sinkhorn_backward.default, (torch.randn(3, 4, 4), plain, text))
