"""``mhc::mix``: the part of ``mhc::post`` that the branch output is not needed for.

    X' = post(X, f, h_post, h_res)   ->   M = mix(X, h_res);   X' = M + h_post f

What is left is the post of a site that does not mix its streams. M has the dtype of the streams:
where that is float32 or wider the two give the bits of the whole, and narrower streams are rounded
once more. Not differentiable: it is for graphs whose backward is known.
"""

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import (
    check_state,
    check_tensor,
    coefficient_dtype,
    state_to_tokens,
    token_shape,
    tokens_to_state,
)
from mhc_compile.kernels.layout import mix as mix_tokens
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


@torch.library.custom_op("mhc::mix", mutates_args=())
def mix(X: torch.Tensor, h_res: torch.Tensor, spec: str) -> torch.Tensor:
    """Mix the streams: ``M_i = sum_j H_res[i, j] X_j``.

    Args:
        X: the state, as for `mhc_compile.kernels.ops_post.post`.
        h_res: as given to ``mhc::post``, [out, in].
        spec: `SiteSpec.encode`.

    Returns:
        The streams mixed, in the shape and dtype of ``X``.

    Raises:
        KernelError: the constraint does not mix; a shape, dtype or device does not fit.
    """
    site = SiteSpec.decode(spec)
    _check(X, h_res, site)
    if kernels := launcher("mhc::mix", site, X, h_res):
        return kernels.mix(X, h_res, site)
    dtype, n = coefficient_dtype(X), site.streams
    with torch.autocast(X.device.type, enabled=False):
        x = state_to_tokens(X, site.dim, dtype)
        mixed = mix_tokens(h_res.to(dtype).reshape(-1, n, n), x)
    return tokens_to_state(mixed, X, site.dim)


def _check(X: torch.Tensor, h_res: torch.Tensor, site: SiteSpec) -> None:
    op, n = "mhc::mix", site.streams
    if not constraint_of(site).mixes:
        raise KernelError(f"{op}: constraint {site.constraint!r} does not mix the streams")
    check_state(op, X, n, site.dim)
    tokens = token_shape(X.shape, site.dim) if site.dynamic else []
    check_tensor(op, "h_res", h_res, [*tokens, n, n], X)


@mix.register_fake
def _(X: torch.Tensor, h_res: torch.Tensor, spec: str) -> torch.Tensor:
    _check(X, h_res, SiteSpec.decode(spec))
    return X.new_empty(X.shape)
