"""The ops against the eager reference and finite differences, in float64 unless said otherwise."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mhc_compile.kernels.constraints import constraint_named
from mhc_compile.kernels.reference import (
    collapse_ref,
    expand_ref,
    post_ref,
    pre_ref,
    seam_ref,
    sinkhorn_ref,
)
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
MakeSite = Callable[..., Any]
LAYOUTS = [((3, 5), -1), ((2, 3, 7), -1), ((2, 7, 3), -2), ((2, 5, 3, 2), -3), ((6,), -1)]


def _gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor | None], seed: int = 1
) -> list[torch.Tensor]:
    """Gradients of a random weighted sum of the outputs that have one."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * weight).sum()
    leaves = [tensor for tensor in inputs if tensor is not None]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def _head(site: Any, dynamic: bool = True) -> tuple[torch.Tensor | None, ...]:
    n, generator = site.spec.streams, torch.Generator().manual_seed(7)

    def tensor(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(site.bias.dtype).requires_grad_()

    width = n * site.X.shape[site.spec.dim]
    return (tensor(width, n), tensor(n), tensor(1)) if dynamic else (None, tensor(n), None)


@pytest.mark.parametrize("dynamic", [True, False])
def test_finite_differences_confirm_pre(
    make_site: MakeSite, constraint: str, n: int, dynamic: bool
) -> None:
    site = make_site(constraint, n, (2, 3), dynamic=dynamic, iters=5)
    outputs = 3 if constraint_named(constraint).mixes else 2  # a constant has no gradient
    assert torch.autograd.gradcheck(
        lambda *tensors: OPS.pre(*tensors, site.text)[:outputs],
        (site.X, *site.parameters),
        fast_mode=True,
    )


@pytest.mark.parametrize("dynamic", [True, False])
def test_finite_differences_confirm_post(
    make_site: MakeSite, constraint: str, n: int, dynamic: bool
) -> None:
    site = make_site(constraint, n, (2, 3), dynamic=dynamic)
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    mixes = constraint_named(constraint).mixes
    h_post, h_res = h_post.detach().requires_grad_(), h_res.detach().requires_grad_(mixes)
    assert torch.autograd.gradcheck(
        lambda *tensors: OPS.post(*tensors, site.text),
        (site.X, site.f, h_post, h_res),
        fast_mode=True,
    )


def _seam_inputs(site: Any) -> tuple[torch.Tensor | None, ...]:
    """Arguments of a seam whose next site has parameters of its own."""
    _, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    following = [None if p is None else (0.5 * p.detach()) for p in site.parameters]
    mixes = constraint_named(site.spec.constraint).mixes
    h_res = h_res.detach().requires_grad_(mixes)
    leaves = [None if p is None else p.requires_grad_() for p in following]
    return (site.X, site.f, h_post.detach().requires_grad_(), h_res, *leaves)


@pytest.mark.parametrize("dynamic", [True, False])
def test_finite_differences_confirm_seam(
    make_site: MakeSite, constraint: str, n: int, dynamic: bool
) -> None:
    site = make_site(constraint, n, (2, 3), dynamic=dynamic, iters=5)
    outputs = 4 if constraint_named(constraint).mixes else 3  # a constant has no gradient
    assert torch.autograd.gradcheck(
        lambda *tensors: OPS.seam(*tensors, site.text)[:outputs],
        _seam_inputs(site),
        fast_mode=True,
    )


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("mode", ["mean", "sum", "learned"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_finite_differences_confirm_collapse(
    make_site: MakeSite, n: int, mode: str, dynamic: bool
) -> None:
    site = make_site("sinkhorn_softmax", n, (2, 3), dynamic=dynamic)
    head = _head(site, dynamic) if mode == "learned" else (None, None, None)
    assert torch.autograd.gradcheck(
        lambda *tensors: OPS.collapse(*tensors, mode, site.text), (site.X, *head), fast_mode=True
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_softmax"])
def test_finite_differences_confirm_sinkhorn(name: str, n: int) -> None:
    spec = SiteSpec(streams=n, constraint=name, iters=5, sinkhorn_eps=1e-3).encode()
    torch.manual_seed(0)
    logits = torch.randn(3, n, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: OPS.sinkhorn(h, spec), (logits,), fast_mode=True)


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_finite_differences_confirm_expand(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: OPS.expand(x, 3, dim), (x,), fast_mode=True)
    assert torch.equal(OPS.expand(x, 3, dim), expand_ref(x, 3, dim))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_one_site_equals_the_reference_in_every_layout(
    make_site: MakeSite, constraint: str, shape: tuple[int, ...], dim: int, dynamic: bool
) -> None:
    site = make_site(constraint, 4, shape, dim=dim, dynamic=dynamic)
    inputs = (site.X, *site.parameters, site.f)

    u, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    ours = (u, h_post, h_res, OPS.post(site.X, site.f * u, h_post, h_res, site.text))
    u, h_post, h_res = pre_ref(site.X, *site.parameters, site.spec)
    truth = (u, h_post, h_res, post_ref(site.X, site.f * u, h_post, h_res, site.spec))

    for mine, right in zip(ours, truth, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, right)
    for mine, right in zip(_gradients(ours, inputs), _gradients(truth, inputs), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_a_seam_equals_the_reference_in_every_layout(
    make_site: MakeSite, constraint: str, shape: tuple[int, ...], dim: int, dynamic: bool
) -> None:
    site = make_site(constraint, 4, shape, dim=dim, dynamic=dynamic)
    inputs = _seam_inputs(site)
    ours = OPS.seam(*inputs, site.text)[:4]
    truth = seam_ref(*inputs, site.spec)
    for mine, right in zip(ours, truth, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, right)
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    for mine, right in zip(_gradients(ours, leaves), _gradients(truth, leaves), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("mode", ["mean", "sum", "learned"])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_collapse_equals_the_reference_in_every_layout(
    make_site: MakeSite, shape: tuple[int, ...], dim: int, mode: str, dynamic: bool
) -> None:
    site = make_site("sinkhorn_softmax", 3, shape, dim=dim, dynamic=dynamic)
    head = _head(site, dynamic) if mode == "learned" else (None, None, None)
    ours = OPS.collapse(site.X, *head, mode, site.text)
    truth = collapse_ref(site.X, *head, mode, site.spec)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, truth)
    inputs = (site.X, *head)
    for mine, right in zip(_gradients([ours], inputs), _gradients([truth], inputs), strict=True):
        torch.testing.assert_close(mine, right)


def test_strided_inputs_give_the_result_of_contiguous_ones(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5))
    strided = site.X.transpose(0, 1).contiguous().transpose(0, 1)
    strided_f = site.f.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert not strided_f.is_contiguous()
    u, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    assert torch.equal(OPS.pre(strided, *site.parameters, site.text)[0], u)
    out = OPS.post(strided, strided_f, h_post, h_res, site.text)
    assert torch.equal(out, OPS.post(site.X, site.f, h_post, h_res, site.text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_keep_float32_coefficients_and_round_once(
    make_site: MakeSite, constraint: str, dtype: torch.dtype
) -> None:
    site = make_site(constraint, 4, (2, 9, 16), dtype=dtype)
    u, h_post, h_res, saved = OPS.pre(site.X, *site.parameters, site.text)
    out = OPS.post(site.X, site.f, h_post, h_res, site.text)
    assert u.dtype == out.dtype == dtype
    assert h_post.dtype == h_res.dtype == saved.dtype == torch.float32

    wide = [t.detach().double() for t in (site.X, *site.parameters)]
    exact_u, exact_post, exact_res = pre_ref(*wide, site.spec)
    exact = post_ref(wide[0], site.f.detach().double(), exact_post, exact_res, site.spec)
    torch.testing.assert_close(h_res.double(), exact_res, rtol=2e-5, atol=2e-6)
    for half, right in ((u, exact_u), (out, exact)):
        rounding = (right.to(dtype).double() - right).norm()
        assert (half.double() - right).norm() <= 1.02 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_rounded_once_and_those_of_parameters_not_at_all(
    make_site: MakeSite, constraint: str, dtype: torch.dtype
) -> None:
    site = make_site(constraint, 4, (2, 9, 16), dtype=dtype)
    leaves = (site.X, *site.parameters)
    used = 3 if constraint_named(constraint).mixes else 2
    outputs = OPS.pre(*leaves, site.text)[:used]
    upstream = [torch.randn_like(t) for t in outputs]
    mine = torch.autograd.grad(outputs, leaves, upstream)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact_outputs = pre_ref(*wide, site.spec)[:used]
    exact = torch.autograd.grad(exact_outputs, wide, [g.double() for g in upstream])

    assert [g.dtype for g in mine] == [dtype, *[torch.float32] * 3]
    rounding = (exact[0].to(dtype).double() - exact[0]).norm()
    assert (mine[0].double() - exact[0]).norm() <= 1.02 * rounding
    for gradient, right in zip(mine[1:], exact[1:], strict=True):
        assert (gradient.double() - right).norm() <= 1e-5 * right.norm()


def test_sixteen_streams_equal_the_reference(make_site: MakeSite) -> None:
    for name in ("sinkhorn", "kronecker", "orthogonal", "none"):
        site = make_site(name, 16, (3, 5))
        inputs = (site.X, *site.parameters)
        ours, truth = OPS.pre(*inputs, site.text)[:3], pre_ref(*inputs, site.spec)
        for mine, right in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, right)
        for mine, right in zip(_gradients(ours, inputs), _gradients(truth, inputs), strict=True):
            torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dynamic", [True, False])
def test_results_have_the_same_bits_with_and_without_grad(
    make_site: MakeSite, constraint: str, dynamic: bool
) -> None:
    site = make_site(constraint, 4, (3, 7, 16), dtype=torch.float32, dynamic=dynamic)
    detached = [None if t is None else t.detach() for t in (site.X, *site.parameters)]
    learned = SiteSpec(streams=4).encode()
    runs = []
    for tensors, f, head in (
        ((site.X, *site.parameters), site.f, _head(site)),
        (detached, site.f.detach(), [t.detach() for t in _head(site)]),
    ):
        u, h_post, h_res, _ = OPS.pre(*tensors, site.text)
        out = OPS.post(tensors[0], f, h_post, h_res, site.text)
        runs.append((u, h_post, h_res, out, OPS.collapse(out, *head, "learned", learned)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_wide_branch_output_is_not_rounded_before_it_is_added(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (3, 8), dtype=torch.bfloat16)
    f = site.f.detach().float() * 1.001
    _, h_post, h_res, _ = (t.detach() for t in OPS.pre(site.X, *site.parameters, site.text))
    wide = [t.detach().double() for t in (site.X, f, h_post, h_res)]
    exact = post_ref(*wide, site.spec)
    out = OPS.post(site.X, f, h_post, h_res, site.text)
    narrow = OPS.post(site.X, f.bfloat16(), h_post, h_res, site.text)
    rounding = (exact.bfloat16().double() - exact).norm()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 1.01 * rounding
    assert (narrow.double() - exact).norm() > 1.05 * rounding


@pytest.mark.parametrize("values", ["zero", "equal", "huge"])
def test_extreme_states_give_finite_numbers(
    make_site: MakeSite, constraint: str, values: str
) -> None:
    site = make_site(constraint, 4, (2, 8), dtype=torch.float32)
    fill = {"zero": 0.0, "equal": 3.0, "huge": 1e15}[values]
    X = torch.full_like(site.X, fill, requires_grad=True)
    u, h_post, h_res, _ = OPS.pre(X, *site.parameters, site.text)
    out = OPS.post(X, u, h_post, h_res, site.text)
    gradients = torch.autograd.grad((out / max(fill, 1.0)).sum(), (X, *site.parameters))
    assert all(t.isfinite().all() for t in (u, h_post, h_res, out, *gradients))


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_empty_batch_passes_through(make_site: MakeSite, constraint: str, dynamic: bool) -> None:
    site = make_site(constraint, 4, (0, 3, 5), dynamic=dynamic)
    u, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
    out = OPS.post(site.X, u, h_post, h_res, site.text)
    assert out.shape == (0, 3, 4, 5)
    gradients = _gradients([out], (site.X, *site.parameters))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("used", range(3))
def test_unused_outputs_count_as_zero_gradients(make_site: MakeSite, used: int) -> None:
    site = make_site("sinkhorn", 4)
    inputs = (site.X, *site.parameters)
    ours = _gradients([OPS.pre(*inputs, site.text)[used]], inputs)
    truth = _gradients([pre_ref(*inputs, site.spec)[used]], inputs)
    for mine, right in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, right)


def test_two_runs_give_bitwise_the_same(make_site: MakeSite, constraint: str) -> None:
    def run() -> list[torch.Tensor]:
        site = make_site(constraint, 4, (8, 37, 24), dtype=torch.float32)
        u, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
        out = OPS.post(site.X, u.tanh(), h_post, h_res, site.text)
        return [out, *_gradients([out], (site.X, *site.parameters))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_mean_keeps_no_state_alive_for_its_backward(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPS.collapse(site.X, None, None, None, "mean", site.text)
    assert saved == []


def test_no_op_returns_or_writes_its_inputs(make_site: MakeSite, constraint: str) -> None:
    for dynamic in (True, False):
        site = make_site(constraint, 1, (2, 3), dynamic=dynamic, requires_grad=False)
        inputs = [site.X, site.f, *(t for t in site.parameters if t is not None)]
        copies = [t.clone() for t in inputs]
        u, h_post, h_res, saved = OPS.pre(site.X, *site.parameters, site.text)
        site_inputs = (site.X, site.f, h_post, h_res)
        post = OPS.post(*site_inputs, site.text)
        backward = OPS.post_backward(post, *site_inputs, site.text)
        pre_backward = OPS.pre_backward(
            u, h_post, h_res, site.X, *site.parameters, saved, site.text
        )
        collapsed = OPS.collapse(site.X, None, None, None, "sum", site.text)
        outputs = [u, h_post, h_res, post, *backward, *pre_backward, collapsed]
        outputs += [OPS.expand(site.f, 1, -1), OPS.expand_backward(site.X, -1)]
        known = {t.data_ptr() for t in (*inputs, h_post, h_res)}
        assert not known & {t.data_ptr() for t in (u, post, *backward, *pre_backward, collapsed)}
        assert len({t.data_ptr() for t in outputs if t.numel()}) == sum(
            t.numel() > 0 for t in outputs
        )
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_differentiating_twice_is_refused_by_name(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4)
    u = OPS.pre(site.X, *site.parameters, site.text)[0]
    (first,) = torch.autograd.grad(u.sum(), site.X, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mhc\.pre_backward"):
        first.sum().backward()


def test_sinkhorn_keeps_dtype_and_computes_in_float32() -> None:
    logits = torch.randn(50, 4, 4, dtype=torch.bfloat16)
    spec = SiteSpec(streams=4)
    out = OPS.sinkhorn(logits, spec.encode())
    assert torch.equal(out, sinkhorn_ref(logits.float(), spec).bfloat16())


def test_autocast_changes_no_bit(make_site: MakeSite, constraint: str) -> None:
    site = make_site(constraint, 4, (2, 9, 16), dtype=torch.float32)
    head, learned = _head(site), SiteSpec(streams=4).encode()

    def run() -> list[torch.Tensor]:
        u, h_post, h_res, _ = OPS.pre(site.X, *site.parameters, site.text)
        out = OPS.post(site.X, site.f, h_post, h_res, site.text)
        x = OPS.collapse(out, *head, "learned", learned)
        leaves = (site.X, site.f, *site.parameters, *head)
        return [u, h_post, h_res, out, x, *_gradients([u, h_post, h_res, out, x], leaves)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("mode", ["mean", "sum", "learned"])
def test_half_ends_are_rounded_once(make_site: MakeSite, mode: str) -> None:
    site = make_site("sinkhorn", 3, (5, 64), dtype=torch.bfloat16)
    head = _head(site) if mode == "learned" else (None, None, None)
    wide_head = [None if t is None else t.detach().double() for t in head]
    exact = collapse_ref(site.X.detach().double(), *wide_head, mode, site.spec)
    out = OPS.collapse(site.X, *head, mode, site.text)
    rounding = (exact.bfloat16().double() - exact).norm()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 1.01 * rounding
    total = site.X.detach().double().sum(-2).bfloat16()
    assert torch.equal(OPS.expand_backward(site.X, -1), total)
