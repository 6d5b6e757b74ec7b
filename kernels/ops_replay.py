"""``mhc::replay``: make the states and branch inputs of several sites again, in one pass.

A backward pass that recomputes a block of sites knows everything that made them but the states:
the branch outputs and the mappings were kept. So nothing is projected or normalised again, and a
token's streams go through all sites of the block without leaving the chip: ``n + s (n + 2)`` rows
of C for s sites, where replaying their seams moves ``s (2 n + 2)`` and every product with phi.

Paper: arXiv 2512.24880, section 4.3.2.
"""

from collections.abc import Sequence

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import (
    check_tensor,
    coefficient_dtype,
    mix,
    narrow_shape,
    state_to_tokens,
    tokens_to_narrow,
)
from mhc_compile.kernels.ops_post import check_post, post
from mhc_compile.kernels.ops_pre import coefficient_shapes, read_weights
from mhc_compile.kernels.select import launcher
from mhc_compile.kernels.spec import SiteSpec


@torch.library.custom_op("mhc::replay", mutates_args=())
def replay(
    X: torch.Tensor,
    f: Sequence[torch.Tensor],
    h_post: Sequence[torch.Tensor],
    h_res: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    alpha: Sequence[torch.Tensor],
    spec: str,
) -> list[torch.Tensor]:
    """Carry the streams over several sites whose mappings are known.

    Args:
        X: the state before the first of them, as for ``mhc::post``.
        f: k branch outputs, in order.
        h_post: the mappings that went with each.
        h_res: likewise.
        saved: the fourth output of ``mhc::pre`` (fifth of ``mhc::seam``) for every state that is
            read: the k that are made here, and, if one more is given, first of all ``X`` itself.
        bias: of the sites that ``saved`` belongs to.
        alpha: likewise.
        spec: `SiteSpec.encode`, the same for all; dynamic.

    Returns:
        The branch input read out of ``X``, if asked for; then for every site its state and the
        branch input read out of it, by turns. To float rounding what ``mhc::pre``, ``mhc::post``
        and ``mhc::seam`` gave; with generated C++ the same bits.

    Raises:
        KernelError: a shape, dtype or device does not fit; the lists do not fit each other; the
            mappings are static, or those of a single pass.
    """
    site = SiteSpec.decode(spec)
    _check(X, f, h_post, h_res, saved, bias, alpha, site)
    tensors = (*h_post, *h_res, *saved, *bias, *alpha)
    widest = max(f, key=lambda branch: branch.dtype.itemsize, default=None)
    if kernels := launcher("mhc::replay", site, X, *tensors, branch=widest):
        return kernels.replay(X, f, h_post, h_res, saved, bias, alpha, site)
    reads, made = list(zip(saved, bias, alpha, strict=True)), []
    if len(reads) > len(f):
        made.append(_read(X, *reads.pop(0), site))
    for branch, to_post, to_res, read in zip(f, h_post, h_res, reads, strict=True):
        X = post(X, branch, to_post, to_res, spec)
        made += [X, _read(X, *read, site)]
    return made


def _read(
    X: torch.Tensor,
    saved: torch.Tensor,
    bias: torch.Tensor,
    alpha: torch.Tensor,
    site: SiteSpec,
) -> torch.Tensor:
    """``u = sum_i H_pre[i] X_i``."""
    dtype = coefficient_dtype(X)
    with torch.autocast(X.device.type, enabled=False):
        weights = read_weights(saved.reshape(-1, saved.shape[-1]).to(dtype), bias, alpha, site)
        u = mix(weights[:, None], state_to_tokens(X, site.dim, dtype)).squeeze(1)
    return tokens_to_narrow(u, narrow_shape(X.shape, site.dim), site.dim, X.dtype)


def _check(
    X: torch.Tensor,
    f: Sequence[torch.Tensor],
    h_post: Sequence[torch.Tensor],
    h_res: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    alpha: Sequence[torch.Tensor],
    site: SiteSpec,
) -> None:
    op = "mhc::replay"
    if not site.dynamic:
        raise KernelError(f"{op}: static mappings have nothing to replay from: use mhc::post")
    if site.single_pass:
        raise KernelError(f"{op}: a single pass reads by its h_post: use mhc::seam")
    posts, reads = {len(f), len(h_post), len(h_res)}, {len(saved), len(bias), len(alpha)}
    if len(posts) != 1 or len(reads) != 1 or len(saved) - len(f) not in (0, 1) or not saved:
        raise KernelError(
            f"{op}: {len(f)} branch outputs with {len(h_post)} h_post and {len(h_res)} h_res, "
            f"and {len(saved)} saved with {len(bias)} biases and {len(alpha)} alphas; sites have "
            "one of each, and X may have one more saved, bias and alpha"
        )
    for branch, to_post, to_res in zip(f, h_post, h_res, strict=True):
        check_post(op, X, branch, to_post, to_res, site)
    shape, scales = coefficient_shapes(X, site)[2], constraint_of(site)
    width = 2 * site.streams + scales.logits(site.streams)
    for values, row, scale in zip(saved, bias, alpha, strict=True):
        check_tensor(op, "saved", values, shape, X)
        check_tensor(op, "bias", row, [width], X)
        check_tensor(op, "alpha", scale, [3], X)


@replay.register_fake
def _(
    X: torch.Tensor,
    f: Sequence[torch.Tensor],
    h_post: Sequence[torch.Tensor],
    h_res: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    alpha: Sequence[torch.Tensor],
    spec: str,
) -> list[torch.Tensor]:
    site = SiteSpec.decode(spec)
    _check(X, f, h_post, h_res, saved, bias, alpha, site)
    narrow = narrow_shape(X.shape, site.dim)
    first = [X.new_empty(narrow)] if len(saved) > len(f) else []
    return first + [X.new_empty(shape) for _ in f for shape in (X.shape, narrow)]


@torch.library.custom_op("mhc::keep", mutates_args=())
def keep(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies, which a partitioner can keep where it has to recompute the op that made the tensors.

    A note for `mhc_compile.passes.replay`, which takes it out of the graph that runs.

    Args:
        tensors: of any shapes and dtypes.

    Returns:
        As many, with the same values.
    """
    return [tensor.clone() for tensor in tensors]


@keep.register_fake
def _(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]
