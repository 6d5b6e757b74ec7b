"""``mhc::seam_norm`` run from the same numbers in any precision by any kernels, and by two ops."""

from dataclasses import replace
from typing import Any

import torch

from mhc_compile.kernels.reference import branch_norm_ref, post_ref, pre_ref
from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import OPS, Results

EPS = 3e-2  # large enough for a mix-up with another epsilon to show
NORMS = [
    ("rms", False, False),
    ("rms", True, False),
    ("layer", False, False),
    ("layer", True, True),
]
NAMES = ("X", "f", "h_post", "h_res", "phi", "bias", "alpha", "weight", "shift")


def normed(spec: SiteSpec, kind: str, **fields: Any) -> SiteSpec:
    return replace(spec, branch_norm=kind, branch_eps=EPS, **fields)


def vectors(
    channels: int, weighed: bool, shifted: bool, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(2, channels, generator=generator, dtype=torch.float64).to(dtype)
    return [made[0] if weighed else None, made[1] if shifted else None]


def run(
    spec: SiteSpec,
    tensors: list[Any],
    affine: list[torch.Tensor | None],
    dtype: torch.dtype,
    kernels: str,
    rounding: torch.dtype | None = None,
) -> Results:
    """The op, or with ``kernels="two ops"`` a seam and torch's norm, and every gradient.

    With ``rounding`` the two ops round the state, and u, between them.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    X, f, phi, bias, alpha, h_post, h_res, dy, dX_next, *more = tensors
    given = dict(zip(NAMES, (X, f, h_post, h_res, phi, bias, alpha, *affine), strict=True))
    leaves = {
        name: None if t is None else t.to(dtype if name in ("X", "f") else wide).requires_grad_()
        for name, t in given.items()
    }
    present = {name: t for name, t in leaves.items() if t is not None}
    if kernels == "two ops":
        *state, weight, shift = leaves.values()
        X_next = post_ref(*state[:4], spec)  # type: ignore[arg-type]
        u, *mappings = pre_ref(_rounded(X_next, rounding), *state[4:], spec)  # type: ignore[arg-type]
        u = _rounded(u, rounding)
        out = [X_next, branch_norm_ref(u, weight, shift, spec), *mappings]
    else:
        text = replace(spec, kernels=kernels).encode()
        *out, _, _ = OPS.seam_norm(*leaves.values(), text)
    pairs = zip(out, (dX_next, dy, *more), strict=True)
    used = [(o, g.to(o.dtype)) for o, g in pairs if o.requires_grad]
    ends, grads = zip(*used, strict=True)
    found = torch.autograd.grad(ends, list(present.values()), grads, allow_unused=True)
    gradients = {f"d{n}": g for n, g in zip(present, found, strict=True) if g is not None}
    results = dict(zip(("next", "y", "h_post'", "h_res'"), out, strict=True))
    return {name: t.detach() for name, t in results.items()} | gradients


def _rounded(t: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return t if dtype is None else t + (t.to(dtype).to(t.dtype) - t).detach()
