"""The generated C++ against the reference in float64: outputs and every gradient."""

import os
from collections.abc import Iterator

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
Results = dict[str, torch.Tensor]
NAMES = ("u", "h_post", "h_res", "next", "dX", "df", "dphi", "dbias", "dalpha")
TOLERANCE = 1e-5

SITES = [("sinkhorn", n) for n in (2, 3, 4, 6, 8)] + [
    ("sinkhorn_softmax", 4), ("identity", 4), ("none", 2), ("none", 4), ("permutations", 3),
    ("permutations", 4), ("kronecker", 2), ("kronecker", 8), ("orthogonal", 3), ("orthogonal", 4),
]  # fmt: skip


def _site(
    constraint: str, n: int, shape: tuple[int, ...], logits: float = 1.0, seed: int = 0
) -> tuple[SiteSpec, list[torch.Tensor]]:
    """A specification with three different epsilons, and X, f, phi, bias, alpha, du, dX'."""
    generator = torch.Generator().manual_seed(seed)
    kind, channels = CONSTRAINTS[constraint], shape[-1]
    width = 2 * n + kind.logits(n)
    state = (*shape[:-1], n, channels)
    phi = (channels, n + 2) if kind.per_stream else (n * channels, width)
    shapes = (state, shape, phi, (width,), (3,), shape, state)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] /= (n * channels) ** 0.5
    tensors[3] *= logits
    eps = 2e-3 if kind.default_eps else 0.0
    spec = SiteSpec(
        streams=n, constraint=constraint, sinkhorn_eps=eps, pre_eps=2.5 * eps, norm_eps=1e-2
    )
    return spec, tensors


def _run(spec: SiteSpec, tensors: list[torch.Tensor], dtype: torch.dtype, kernels: str) -> Results:
    """One site forward and backward with ``u`` and the next state differentiated."""
    text = f"{spec.encode()} kernels={kernels}"
    # Parameters stay wide under half streams, as they do in a model.
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (dtype, dtype, parameter, parameter, parameter)
    leaves = [t.to(d).requires_grad_() for t, d in zip(tensors[:5], dtypes, strict=True)]
    X, f, phi, bias, alpha = leaves
    u, h_post, h_res, _ = OPS.pre(X, phi, bias, alpha, text)
    out = OPS.post(X, f, h_post, h_res, text)
    grads = torch.autograd.grad([u, out], leaves, [t.to(dtype) for t in tensors[5:]])
    results = (u, h_post, h_res, out, *grads)
    return dict(zip(NAMES, [t.detach() for t in results], strict=True))


def _errors(ours: Results, truth: Results) -> dict[str, float]:
    scales = {name: truth[name].norm().clamp_min(1e-30) for name in NAMES}
    return {name: float((ours[name] - truth[name]).norm() / scales[name]) for name in NAMES}


def _check(ours: Results, truth: Results, tolerance: float = TOLERANCE) -> None:
    errors = _errors(ours, truth)
    assert all(error <= tolerance for error in errors.values()), errors  # a NaN fails too


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("channels", [16, 48, 64, 129, 200, 512])
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_every_shape_agrees_with_float64_and_is_written_whole(tokens: int, channels: int) -> None:
    spec, tensors = _site("sinkhorn", 4, (tokens, channels))
    truth = _run(spec, tensors, torch.float64, "reference")
    _check(_run(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_every_constraint_agrees_with_float64(name: str, n: int, channels: int) -> None:
    spec, tensors = _site(name, n, (2, 17, channels))
    truth = _run(spec, tensors, torch.float64, "reference")
    _check(_run(spec, tensors, torch.float32, "cpp"), truth)


@pytest.mark.parametrize("logits", [1.0, 4.0, 8.0, 30.0])
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_softmax"])
def test_large_logits_are_as_accurate_as_in_the_reference(name: str, logits: float) -> None:
    for seed in range(3):
        spec, tensors = _site(name, 4, (20, 48), logits, seed)
        truth = _run(spec, tensors, torch.float64, "reference")
        ours = _errors(_run(spec, tensors, torch.float32, "cpp"), truth)
        plain = _errors(_run(spec, tensors, torch.float32, "reference"), truth)
        assert all(ours[x] <= max(TOLERANCE, 2 * plain[x]) for x in NAMES), (ours, plain)


@pytest.mark.parametrize("fill", [0.0, 3.0, 1e15])
@pytest.mark.parametrize(("name", "n"), [site for site in SITES if site[1] == 4])
def test_equal_states_of_any_size_agree_and_are_finite(name: str, n: int, fill: float) -> None:
    spec, tensors = _site(name, n, (5, 48))
    tensors[0].fill_(fill)
    tensors[3].fill_(1.0)
    truth = _run(spec, tensors, torch.float64, "reference")
    ours = _run(spec, tensors, torch.float32, "cpp")
    assert all(t.isfinite().all() for t in ours.values())
    forward = {name: error for name, error in _errors(ours, truth).items() if name[0] != "d"}
    assert all(error <= TOLERANCE for error in forward.values()), forward


def test_a_row_of_vanishing_logits_is_no_division_by_zero() -> None:
    spec, tensors = _site("sinkhorn", 4, (5, 48))
    tensors[3][8:12] = -300.0
    tensors[4].fill_(0.1)
    truth = _run(spec, tensors, torch.float64, "reference")
    ours = _run(spec, tensors, torch.float32, "cpp")
    assert all(t.isfinite().all() for t in ours.values())
    assert _errors(ours, truth)["h_res"] <= 1e-4  # logits of 300 carry an error of 3e-5 each


@pytest.mark.parametrize("channels", [64, 129])
@pytest.mark.parametrize("name", ["sinkhorn", "none"])
def test_half_streams_only_carry_the_rounding_of_the_outputs(name: str, channels: int) -> None:
    spec, tensors = _site(name, 4, (37, channels))
    tensors = [tensors[0].bfloat16(), tensors[1].bfloat16(), *tensors[2:5],
               *(t.bfloat16() for t in tensors[5:])]  # fmt: skip
    tensors = [t.double() for t in tensors]
    # The coefficients that post reads are float32 in both; everything inside is float32 too.
    truth = _run(spec, tensors, torch.float64, "reference")
    ours = _run(spec, tensors, torch.bfloat16, "cpp")
    errors = _errors(ours, truth)
    for x in ("u", "next", "df"):
        rounding = (truth[x].bfloat16() - truth[x]).norm() / truth[x].norm()
        assert errors[x] <= 1.01 * float(rounding), (x, errors)
    for x in ("h_post", "h_res", "dphi", "dbias", "dalpha"):
        assert errors[x] <= TOLERANCE, (x, errors)
    assert errors["dX"] <= 8e-3  # three roundings: pre's, post's, and of their sum


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_collapse_is_rounded_once(mode: str, n: int, channels: int, dtype: torch.dtype) -> None:
    spec, tensors = _site("sinkhorn", n, (2, 17, channels))
    X = tensors[0].to(dtype)
    text = f"{spec.encode()} kernels="
    exact = OPS.collapse(X.double(), None, None, None, mode, text + "reference")
    ours = OPS.collapse(X, None, None, None, mode, text + "cpp")
    assert ours.shape == exact.shape
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_bitwise_the_same(threads: int) -> None:
    spec, tensors = _site("sinkhorn", 4, (130, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (_run(spec, tensors, torch.float32, "cpp") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    truth = _run(spec, tensors, torch.float64, "reference")
    _check(first, truth)


@pytest.mark.parametrize(("name", "n"), [site for site in SITES if site[1] == 4])
def test_a_nan_stays_visible_and_stays_with_its_token(name: str, n: int) -> None:
    spec, tensors = _site(name, n, (20, 48))
    clean = _run(spec, tensors, torch.float32, "cpp")
    tensors[0][3, 1, 5] = torch.nan
    found = _run(spec, tensors, torch.float32, "cpp")
    plain = _run(spec, tensors, torch.float32, "reference")
    others = torch.arange(20) != 3
    for x in ("u", "next"):
        assert torch.equal(found[x].isnan(), plain[x].isnan())
        assert torch.equal(found[x][others], clean[x][others])
    assert found["dphi"].isnan().any()


def test_any_strides_are_read_right() -> None:
    spec, tensors = _site("sinkhorn", 4, (6, 48))
    straight = _run(spec, tensors, torch.float32, "cpp")
    turned = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors]
    assert not turned[0].is_contiguous()
    bent = _run(spec, turned, torch.float32, "cpp")
    assert all(torch.equal(straight[name], bent[name]) for name in NAMES)


def test_streamed_results_equal_stored_ones() -> None:
    # From 2^20 elements on, states are written past the caches.
    spec, tensors = _site("sinkhorn", 4, (2048, 128))
    few = [t[:16] if i in (0, 1, 5, 6) else t for i, t in enumerate(tensors)]
    large = _run(spec, tensors, torch.float32, "cpp")
    small = _run(spec, few, torch.float32, "cpp")
    assert all(torch.equal(large[name][:16], small[name]) for name in ("next", "dX", "u"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_the_same() -> None:
    spec, tensors = _site("sinkhorn", 4, (20, 48))
    expected = _run(spec, tensors, torch.float32, "cpp")
    child = os.fork()
    if child == 0:
        same = False
        try:
            torch.set_num_threads(1)
            again = _run(spec, tensors, torch.float32, "cpp")
            same = all(torch.equal(again[name], expected[name]) for name in NAMES)
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
