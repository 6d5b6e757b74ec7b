"""Random sites, and their ops run from the same numbers in any precision by any kernels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.layout import token_shape, widened_shape
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
TOLERANCE = 1e-5
HALVES = ("u", "h_post", "h_res", "next", "dX", "df", "dphi", "dbias", "dalpha")
SEAM = ("next", "u", "h_post", "h_res", "dX", "df", "dh_post", "dh_res", "dphi", "dbias", "dalpha")

SITES = [("sinkhorn", n) for n in (2, 3, 4, 6, 8)] + [
    ("sinkhorn_softmax", 4), ("sinkhorn_exp", 3), ("sinkhorn_exp", 4), ("identity", 4), ("none", 2),
    ("none", 4), ("permutations", 3), ("permutations", 4), ("kronecker", 2), ("kronecker", 8),
    ("orthogonal", 3), ("orthogonal", 4),
]  # fmt: skip

Results = dict[str, torch.Tensor]
Tensors = list[Any]
"""X, f, phi, bias, alpha, h_post and h_res of a site, then gradients of u, of the next state, of
h_post and of h_res; phi and alpha are None if static."""


def random_site(
    constraint: str,
    n: int,
    shape: Sequence[int],
    logits: float = 1.0,
    seed: int = 0,
    **fields: Any,
) -> tuple[SiteSpec, Tensors]:
    """A specification with three different epsilons, and its tensors in float64.

    Args:
        constraint: name of the constraint.
        n: number of streams.
        shape: of the un-widened tensor.
        logits: standard deviation of the bias.
        seed: of the random numbers.
        fields: other fields of the specification.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = CONSTRAINTS[constraint]
    eps = 2e-3 if kind.default_eps else 0.0
    spec = SiteSpec(
        streams=n,
        constraint=constraint,
        sinkhorn_eps=eps,
        pre_eps=2.5 * eps,
        norm_eps=1e-2,
        **fields,
    )

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels, width = shape[spec.dim], 2 * n + kind.logits(n)
    state = widened_shape(shape, n, spec.dim)
    tokens = token_shape(state, spec.dim) if spec.dynamic else []
    phi_shape = (channels, n + 2) if kind.per_stream else (n * channels, width)
    X, f = normal(*state), normal(*shape)
    phi = normal(*phi_shape) / (n * channels) ** 0.5
    bias, alpha, du, dX_next = logits * normal(width), normal(3), normal(*shape), normal(*state)
    h_post = 2 * normal(*tokens, n).sigmoid()
    mixed = tokens if kind.mixes else []
    h_res = normal(*mixed, n, n).softmax(-1) if kind.mixes else torch.eye(n, dtype=torch.float64)
    grads = [du, dX_next, normal(*tokens, n), normal(*mixed, n, n)]
    dynamic = (phi, bias, alpha) if spec.dynamic else (None, bias, None)
    return spec, [X, f, *dynamic, h_post, h_res, *grads]


def leaves_of(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """X and f in ``dtype``, parameters and mappings in float32 at least; all need gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (dtype, dtype, wide, wide, wide, wide, wide)
    return [
        None if tensor is None else tensor.to(kind).requires_grad_()
        for tensor, kind in zip(tensors, dtypes, strict=False)
    ]


def run_halves(spec: SiteSpec, tensors: Tensors, dtype: torch.dtype, kernels: str) -> Results:
    """`pre` and `post` of one site, forward and backward through u and the next state."""
    text = replace(spec, kernels=kernels).encode()
    X, f, phi, bias, alpha = leaves_of(tensors, dtype)[:5]
    u, h_post, h_res, _ = OPS.pre(X, phi, bias, alpha, text)
    out = OPS.post(X, f, h_post, h_res, text)
    leaves = {"dX": X, "df": f, "dphi": phi, "dbias": bias, "dalpha": alpha}
    outputs = {"u": u, "h_post": h_post, "h_res": h_res, "next": out}
    return _results(outputs, leaves, [u, out], [t.to(dtype) for t in tensors[7:9]])


def run_seam(
    spec: SiteSpec,
    tensors: Tensors,
    dtype: torch.dtype,
    kernels: str,
    rounding: torch.dtype | None = None,
) -> Results:
    """`seam`, forward and backward through all outputs.

    With ``rounding`` it is made of `post` and `pre`, and the state between them rounded.
    """
    text = replace(spec, kernels=kernels).encode()
    X, f, phi, bias, alpha, h_post, h_res = leaves_of(tensors, dtype)
    if rounding is None:
        next_state, u, *mappings, _ = OPS.seam(X, f, h_post, h_res, phi, bias, alpha, text)
    else:
        next_state = OPS.post(X, f, h_post, h_res, text)
        rounded = next_state + (next_state.to(rounding).to(dtype) - next_state).detach()
        u, *mappings, _ = OPS.pre(rounded, phi, bias, alpha, text)
    names = ("dX", "df", "dphi", "dbias", "dalpha", "dh_post", "dh_res")
    leaves = dict(zip(names, (X, f, phi, bias, alpha, h_post, h_res), strict=True))
    outputs = {"next": next_state, "u": u, "h_post": mappings[0], "h_res": mappings[1]}
    differentiated = [next_state, u, *(m for m in mappings if m.requires_grad)]
    grads = [tensors[8], tensors[7], *tensors[9:]]
    grads = [g.to(t.dtype) for g, t in zip(grads, differentiated, strict=False)]
    return _results(outputs, leaves, differentiated, grads)


def run_collapse(spec: SiteSpec, tensors: Tensors, dtype: torch.dtype, kernels: str) -> Results:
    """A learned collapse, forward and backward."""
    n, (X, _, phi, bias, alpha) = spec.streams, leaves_of(tensors, dtype)[:5]
    parameters = [
        None if phi is None else phi[:, :n],
        bias[:n],
        None if alpha is None else alpha[:1],
    ]
    text = replace(spec, kernels=kernels).encode()
    out = OPS.collapse(X, *parameters, "learned", text)
    leaves = {"dX": X, "dphi": phi, "dbias": bias, "dalpha": alpha}
    return _results({"x": out}, leaves, [out], [tensors[7].to(dtype)])


def _results(
    outputs: Results, leaves: dict[str, Any], differentiated: list[torch.Tensor], grads: Tensors
) -> Results:
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(differentiated, list(present.values()), grads, allow_unused=True)
    gradients = {name: grad for name, grad in zip(present, found, strict=True) if grad is not None}
    return {name: output.detach() for name, output in outputs.items()} | gradients


def errors(ours: Results, truth: Results) -> dict[str, float]:
    """Relative error of every result, by norm.

    The three numbers of dalpha add up the terms of dbias, times numbers of about 1, and may cancel
    by chance: their error is held against the larger of the two.
    """
    assert ours.keys() == truth.keys()
    scales = {name: exact.norm() for name, exact in truth.items()}
    if "dalpha" in scales:
        scales["dalpha"] = torch.maximum(scales["dalpha"], scales["dbias"])
    return {
        name: float((ours[name] - exact).norm() / scales[name].clamp_min(1e-30))
        for name, exact in truth.items()
    }


def check(ours: Results, truth: Results, tolerance: float = TOLERANCE) -> None:
    """Assert that every result is exact to ``tolerance``; a NaN is not."""
    found = errors(ours, truth)
    assert all(error <= tolerance for error in found.values()), found
