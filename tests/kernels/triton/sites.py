"""Sites for the tests of the Triton kernels: tensors, what the kernels make of them, the truth."""

from dataclasses import dataclass
from typing import Any

import torch

from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_of
from mhc_compile.kernels.ops_pre import coefficient_shapes
from mhc_compile.kernels.reference import collapse_ref, post_ref, pre_ref, read_ref
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch

Results = dict[str, torch.Tensor]
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Seam:
    """The arguments of ``mhc::seam`` and the gradients of its results."""

    spec: SiteSpec
    X: torch.Tensor
    f: torch.Tensor
    h_post: torch.Tensor
    h_res: torch.Tensor
    phi: torch.Tensor | None
    bias: torch.Tensor
    alpha: torch.Tensor | None
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

    @property
    def given(self) -> tuple[Any, ...]:
        """The tensors, in the order of the op."""
        return self.X, self.f, self.h_post, self.h_res, self.phi, self.bias, self.alpha


def make_spec(
    constraint: str, n: int, *, dynamic: bool = True, iters: int = 3, single_pass: bool = False
) -> SiteSpec:
    """A site with three epsilons that are different, and large enough for a mix-up to show."""
    eps = 2e-3 if CONSTRAINTS[constraint].default_eps else 0.0
    return SiteSpec(
        streams=n,
        constraint=constraint,
        iters=iters,
        sinkhorn_eps=eps,
        pre_eps=2.5 * eps,
        norm_eps=1e-2,
        dynamic=dynamic,
        single_pass=single_pass,
    )


def make_seam(
    spec: SiteSpec,
    tokens: int,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    logits: float = 1.0,
    seed: int = 0,
) -> Seam:
    """Random float32 parameters, streams of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    kind, n = constraint_of(spec), spec.streams
    width, lead = 2 * n + kind.logits(n), (tokens,) if spec.dynamic else ()

    def make(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    def h_res() -> torch.Tensor:
        return make(*lead, n, n) if kind.mixes else torch.eye(n)

    phi = make(channels, n + 2) if kind.per_stream else make(n * channels, width)
    return Seam(
        spec,
        make(tokens, n, channels, of=dtype),
        make(tokens, channels, of=dtype),
        make(*lead, spec.gates),
        h_res(),
        phi / (n * channels) ** 0.5 if spec.dynamic else None,
        make(width) * logits,
        make(3) if spec.dynamic else None,
        (make(tokens, n, channels, of=dtype), make(tokens, channels, of=dtype),
         make(*lead, spec.gates), h_res()),
    )  # fmt: skip


def run_seam(seam: Seam) -> Results:
    """The seam and its gradients, by the generated kernels."""
    *outputs, saved = seam_outputs(seam)
    grads = launch.seam_backward(*seam.grads, *seam.given, saved, seam.spec)
    return _named(seam, [*outputs, *grads])


def seam_outputs(seam: Seam) -> tuple[torch.Tensor, ...]:
    """What ``mhc::seam`` returns, by the generated kernels."""
    return launch.seam(*seam.given, seam.spec, coefficient_shapes(seam.X, seam.spec))


def run_halves(seam: Seam) -> Results:
    """The same by the kernels of post and of pre."""
    mappings = (seam.h_post, seam.h_res)
    out = launch.post(seam.X, seam.f, *mappings, seam.spec)
    shapes = coefficient_shapes(seam.X, seam.spec)
    parameters = (seam.phi, seam.bias, seam.alpha)
    gates = seam.h_post if seam.spec.single_pass else None
    u, h_post, h_res, saved = launch.pre(out, *parameters, seam.spec, shapes, gates)
    d_next, *inner = seam.grads
    given = (*inner, out, *parameters, saved, seam.spec, d_next)
    d_out, *grads, dgates = launch.pre_backward(*given, gates=gates)
    dX, df, dh_post, dh_res = launch.post_backward(d_out, seam.X, seam.f, *mappings, seam.spec)
    if gates is not None:
        assert not dh_post[..., : gates.shape[-1] // 2].any()
        dh_post = dh_post + dgates
    return _named(seam, [out, u, h_post, h_res, dX, df, dh_post, dh_res, *grads])


def run_read(seam: Seam) -> Results:
    """``mhc::read`` of the state by the gates, and its gradients."""
    u = launch.read(seam.X, seam.h_post, seam.spec)
    dX, dgates = launch.read_backward(seam.grads[1], seam.X, seam.h_post, seam.spec)
    return {"u": u, "dX": dX, "dh_post": dgates}


def exact_read(seam: Seam) -> Results:
    """The same in float64."""
    wide = [t.double().requires_grad_() for t in (seam.X, seam.h_post)]
    u = read_ref(wide[0], wide[1], seam.spec)
    dX, dgates = torch.autograd.grad(u, wide, seam.grads[1].double())
    return {"u": u.detach(), "dX": dX, "dh_post": dgates}


def exact_seam(seam: Seam, dtype: torch.dtype = torch.float64) -> Results:
    """The truth: the reference in float64, differentiated by autograd."""
    wide = [None if t is None else t.detach().to(dtype).requires_grad_() for t in seam.given]
    X, f, h_post, h_res, phi, bias, alpha = wide
    out = post_ref(X, f, h_post, h_res, seam.spec)
    gates = h_post if seam.spec.single_pass else None
    outputs = (out, *pre_ref(out, phi, bias, alpha, seam.spec, gates))
    flowing = [
        (o, g.to(dtype)) for o, g in zip(outputs, seam.grads, strict=True) if o.requires_grad
    ]
    leaves = [t for t in wide if t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in flowing],
            leaves,
            [g for _, g in flowing],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    grads = [torch.empty(0) if t is None else next(found) for t in wide]
    return _named(seam, [o.detach() for o in outputs] + grads)


def _named(seam: Seam, results: list[torch.Tensor]) -> Results:
    names = ("next", "u", "h_post", "h_res", "dX", "df", "dh_post", "dh_res", "dphi", "dbias",
             "dalpha")  # fmt: skip
    named = dict(zip(names, results, strict=True))
    if not constraint_of(seam.spec).mixes:
        del named["dh_res"]  # the reference differentiates what the op does not read
    return {name: result for name, result in named.items() if result.numel()}


def exact_head(
    tensors: tuple[torch.Tensor | None, ...], grad: torch.Tensor, spec: SiteSpec
) -> list[torch.Tensor]:
    """A learned collapse and its gradients, in float64."""
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    out = collapse_ref(wide[0], wide[1], wide[2], wide[3], "learned", spec)
    grads = torch.autograd.grad(out, [t for t in wide if t is not None], grad.double())
    return [out.detach(), *grads]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in norm."""
    return float((found.double() - exact).norm() / exact.double().norm().clamp_min(1e-30))


def errors(found: Results, exact: Results) -> dict[str, float]:
    """The `error` of each result."""
    assert found.keys() == exact.keys()
    return {name: error(found[name], exact[name]) for name in exact}


def check(found: Results, exact: Results, tolerance: float = TOLERANCE) -> None:
    """Every result is as exact as float32 allows; a NaN fails too."""
    all_errors = errors(found, exact)
    assert all(value <= tolerance for value in all_errors.values()), all_errors
