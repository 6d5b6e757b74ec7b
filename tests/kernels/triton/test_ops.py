"""The generated Triton, interpreted, against the reference in float64: outputs and gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch, site
from tests.kernels.triton.sites import (
    TOLERANCE,
    Results,
    Seam,
    check,
    error,
    errors,
    exact_head,
    exact_seam,
    make_seam,
    make_spec,
    run_halves,
    run_seam,
    seam_outputs,
)

pytestmark = pytest.mark.interpreted

SITES = [
    ("sinkhorn", 2), ("sinkhorn", 3), ("sinkhorn_softmax", 4), ("sinkhorn_exp", 3),
    ("identity", 4), ("none", 4), ("permutations", 3), ("kronecker", 4), ("orthogonal", 3),
]  # fmt: skip
MANY_STREAMS = [("sinkhorn", 6), ("sinkhorn", 8), ("none", 8), ("kronecker", 8), ("sinkhorn", 1)]
SHAPES = [(1, 16), (3, 129), (5, 200), (37, 48), (70, 64)]
LONG_SHAPES = [(17, 512), (9, 1280), (3, 2560)]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["one launch", "scan and mix"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the forward kernels, whatever the rule for so few tokens says."""
    monkeypatch.setattr(site, "one_launch", lambda *_: request.param == "one launch")
    return str(request.param)


@pytest.mark.parametrize(("name", "n"), SITES)
def test_a_seam_of_every_constraint_follows_float64(name: str, n: int) -> None:
    seam = make_seam(make_spec(name, n), 9, 48)
    check(run_seam(seam), exact_seam(seam))


@pytest.mark.parametrize("name", ["sinkhorn", "none", "identity"])
def test_one_launch_gives_the_same_as_scan_and_mix(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = make_seam(make_spec(name, 2), 19, 264)
    apart = seam_outputs(seam)
    monkeypatch.setattr(site, "one_launch", lambda *_: True)
    for one, other in zip(seam_outputs(seam), apart, strict=True):
        assert error(one, other) <= 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("name", "n"), [*SITES, *MANY_STREAMS])
def test_a_seam_of_twenty_iterations_follows_float64(name: str, n: int) -> None:
    seam = make_seam(make_spec(name, n, iters=20), 19, 48)
    check(run_seam(seam), exact_seam(seam))


@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_every_shape_follows_float64_and_is_written_whole(tokens: int, channels: int) -> None:
    seam = make_seam(make_spec("kronecker", 2), tokens, channels)
    check(run_seam(seam), exact_seam(seam))


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("tokens", "channels"), [*SHAPES, *LONG_SHAPES])
def test_every_shape_follows_float64_in_both_forms(tokens: int, channels: int) -> None:
    seam = make_seam(make_spec("sinkhorn", 4, iters=20), tokens, channels)
    check(run_seam(seam), exact_seam(seam))


@pytest.mark.parametrize("name", ["sinkhorn", "none", "identity"])
def test_post_and_pre_apart_follow_float64(name: str) -> None:
    seam = make_seam(make_spec(name, 3), 9, 72)
    check(run_halves(seam), exact_seam(seam))


@pytest.mark.parametrize("name", ["identity", "none"])
def test_the_backward_in_parts_gives_the_bits_of_the_whole(name: str) -> None:
    seam = make_seam(make_spec(name, 2), 19, 48)
    spec, (X, f, h_post, h_res, phi, bias, alpha) = seam.spec, seam.given
    assert phi is not None
    saved, (_, *inner) = seam_outputs(seam)[-1], seam.grads
    wholes = (
        launch.seam_backward(*seam.grads, *seam.given, saved, spec),
        launch.pre_backward(*inner, X, phi, bias, alpha, saved, spec)[:4],  # without gates
    )
    parts = (
        launch.seam_backward(*seam.grads, *seam.given, saved, spec, with_dz=True),
        launch.pre_backward(*inner, X, phi, bias, alpha, saved, spec, with_dz=True)[:4],
    )
    for whole, part, before in zip(
        wholes, parts, ((f, h_post, h_res), (None, None, None)), strict=True
    ):
        *others, dz, dbias, dalpha = part
        dphi = launch.phi_backward(dz, X, *before, phi, spec)
        assert all(map(torch.equal, whole, (*others, dphi, dbias, dalpha)))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("n", "channels"), [(2, 48), (3, 129), (4, 72), (8, 48)])
def test_mixing_first_gives_the_bits_of_the_whole_post(
    n: int, channels: int, dynamic: bool
) -> None:
    seam = make_seam(make_spec("sinkhorn", n, dynamic=dynamic), 19, channels)
    X, f, h_post, h_res, *_ = seam.given
    mixed = launch.mix(X, h_res, seam.spec)
    assert error(mixed, h_res.double() @ X.double()) <= TOLERANCE
    still = replace(seam.spec, constraint="identity")
    found = launch.post(mixed, f, h_post, torch.eye(n), still)
    assert torch.equal(found, launch.post(X, f, h_post, h_res, seam.spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_mixed_alone_are_rounded_once(dtype: torch.dtype) -> None:
    seam = make_seam(make_spec("sinkhorn", 4), 9, 72, dtype=dtype)
    exact = seam.h_res.double() @ seam.X.double()
    found = launch.mix(seam.X, seam.h_res, seam.spec)
    assert found.dtype == dtype
    assert error(found, exact) <= 1.01 * error(exact.to(dtype), exact)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", ["sinkhorn", "identity"])
def test_the_backward_of_post_in_parts_gives_the_bits_of_the_whole(
    name: str, dynamic: bool
) -> None:
    seam = make_seam(make_spec(name, 3, dynamic=dynamic), 19, 129)
    given = (seam.grads[0], seam.X, seam.f, seam.h_post, seam.h_res, seam.spec)
    dX, df, *mappings = launch.post_backward(*given)
    alone = launch.post_backward_branch(seam.grads[0], seam.h_post, torch.float32, seam.spec)
    assert torch.equal(alone, df)
    assert all(map(torch.equal, launch.post_backward_state(*given), (dX, *mappings)))


@pytest.mark.parametrize(("name", "n"), [("sinkhorn", 3), ("none", 2), ("identity", 2)])
def test_static_sites_follow_float64(name: str, n: int) -> None:
    seam = make_seam(make_spec(name, n, dynamic=False), 9, 48)
    exact = exact_seam(seam)
    check(run_seam(seam), exact)
    check(run_halves(seam), exact)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_learned_collapse_follows_float64(dynamic: bool) -> None:
    spec = make_spec("sinkhorn_softmax", 4, dynamic=dynamic)
    X, bias, grad = torch.randn(9, 4, 200), torch.randn(4), torch.randn(9, 200)
    phi = torch.randn(800, 4) / 800**0.5 if dynamic else None
    alpha = torch.randn(1) if dynamic else None
    exact = exact_head((X, phi, bias, alpha), grad, spec)
    out = launch.collapse(X, phi, bias, alpha, "learned", spec)
    grads = launch.collapse_backward(grad, X, phi, bias, alpha, spec)
    found = [out, *(g for g in grads if g.numel())]
    assert [error(a, b) <= 1e-5 for a, b in zip(found, exact, strict=True)] == [True] * len(exact)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_collapse_is_rounded_once(n: int) -> None:
    spec, X = SiteSpec(streams=n), torch.randn(2, 5, n, 129).bfloat16()
    for mode, exact in (("mean", X.double().mean(-2)), ("sum", X.double().sum(-2))):
        found = launch.collapse(X, None, None, None, mode, spec)
        assert error(found, exact) <= 1.01 * error(exact.bfloat16(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_only_carry_the_rounding_of_the_outputs(dtype: torch.dtype) -> None:
    seam = make_seam(make_spec("sinkhorn", 3), 9, 72, dtype=dtype)
    found, exact = run_seam(seam), exact_seam(seam)
    rounding = {name: error(exact[name].to(dtype), exact[name]) for name in exact}
    far = errors(found, exact)
    assert far["next"] <= 1.01 * rounding["next"], far
    # All others are of the X' that was stored, not of the exact one.
    assert far["df"] <= 1.1 * rounding["df"], far
    assert far["dX"] <= 1.1 * rounding["dX"], far
    assert all(far[name] <= 4 * rounding["next"] for name in exact), far
    next_state = found["next"].double()
    again = exact_seam(_from_state(seam, next_state))
    for name in ("h_post", "h_res"):
        assert error(found[name], again[name]) <= 1e-5, name


def _from_state(seam: Seam, X: torch.Tensor) -> Seam:
    """A seam whose next state is ``X`` itself."""
    tokens, n, _ = X.shape
    h_res = torch.eye(n).expand(tokens, n, n).contiguous()
    f, h_post = torch.zeros_like(X[:, 0]), torch.zeros(tokens, n)
    return Seam(seam.spec, X, f, h_post, h_res, seam.phi, seam.bias, seam.alpha, seam.grads)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("sinkhorn", 30.0),
        ("sinkhorn_softmax", 8.0),
        pytest.param("sinkhorn", 4.0, marks=pytest.mark.slow),
        pytest.param("sinkhorn", 8.0, marks=pytest.mark.slow),
        pytest.param("sinkhorn_softmax", 30.0, marks=pytest.mark.slow),
    ],
)
def test_large_logits_are_as_exact_as_in_the_reference(name: str, logits: float) -> None:
    seam = make_seam(make_spec(name, 4, iters=20), 8, 48, logits=logits)
    exact = exact_seam(seam)
    ours, plain = errors(run_seam(seam), exact), errors(exact_seam(seam, torch.float32), exact)
    # Where float32 cancels, the reference in float32 is no better.
    assert all(ours[x] <= max(TOLERANCE, 2 * plain[x]) for x in exact), (ours, plain)


@pytest.mark.parametrize("fill", [0.0, 1e15])
def test_equal_states_of_any_size_are_finite(fill: float) -> None:
    seam = make_seam(make_spec("sinkhorn", 4), 2, 16)
    seam.X.fill_(fill)
    seam.f.fill_(fill)
    found, exact = run_seam(seam), exact_seam(seam)
    assert all(result.isfinite().all() for result in found.values())
    for name in ("u", "next", "h_post", "h_res"):
        assert error(found[name], exact[name]) <= 1e-5, name


def test_two_runs_give_bitwise_the_same() -> None:
    seam = make_seam(make_spec("none", 2), 19, 24)
    first, second = run_seam(seam), run_seam(seam)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_nan_stays_visible_and_stays_with_its_token() -> None:
    seam = make_seam(make_spec("sinkhorn", 2), 20, 24)
    clean = run_seam(seam)
    seam.X[3, 1, 5] = torch.nan
    found = run_seam(seam)
    others = torch.arange(20) != 3
    for name in ("u", "next", "h_res", "dX"):
        assert found[name][3].isnan().any()
        assert torch.equal(found[name][others], clean[name][others])
    assert found["dphi"].isnan().any()


def test_any_strides_are_read_right() -> None:
    seam = make_seam(make_spec("kronecker", 2), 9, 48)
    straight = run_seam(seam)
    X = seam.X.mT.contiguous().mT
    assert not X.is_contiguous()
    bent: Results = run_seam(
        Seam(seam.spec, X, seam.f.mT.contiguous().mT, seam.h_post, seam.h_res, seam.phi,
             seam.bias, seam.alpha, seam.grads)
    )  # fmt: skip
    assert all(torch.equal(straight[name], bent[name]) for name in straight)


@pytest.mark.parametrize("run", [run_halves, run_seam])
def test_the_gradient_of_a_transposed_phi_is_transposed_too(run: Callable[[Seam], Results]) -> None:
    seam = make_seam(make_spec("sinkhorn", 3), 9, 48)
    assert seam.phi is not None
    turned = replace(seam, phi=seam.phi.t().contiguous().t())
    plain, found = run(seam), run(turned)
    assert found["dphi"].stride() == turned.phi.stride()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
