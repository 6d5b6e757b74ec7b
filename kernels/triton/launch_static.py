"""The generated kernels of static sites called with tensors: what `launch` does where phi is None.

The mappings are made again wherever they are needed: n or n^2 numbers.
"""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.layout import SeamGradients
from mhc_compile.kernels.triton.site import Site, floats


def pre(
    site: Site,
    X: torch.Tensor,
    bias: torch.Tensor,
    shapes: Sequence[Sequence[int]],
    gates: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre``."""
    h_pre, (h_post, h_res, saved) = _mappings(site, bias, shapes)
    return read(site, X, h_pre if gates is None else gates), h_post, h_res, saved


def read(site: Site, X: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``sum_i weights[i] X_i``, by the first n weights."""
    u = X.new_empty((*X.shape[:-2], site.channels))
    site.run("static_pre", X, u, *floats(weights))
    return u


def pre_backward(
    site: Site,
    du: torch.Tensor,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
    X: torch.Tensor,
    bias: torch.Tensor,
    gates: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::pre_backward``: the gradients of X, bias and gates."""
    if gates is not None:
        dX, dgates = read_backward(site, du, X, gates)
        return dX, _maps_backward(site, bias, None, dh_post, dh_res), dgates
    dX, dh_pre = _read_backward(site, du, X, _weights(site, bias))
    return dX, _maps_backward(site, bias, dh_pre, dh_post, dh_res), site.room(0)


def read_backward(
    site: Site, du: torch.Tensor, X: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mhc::read_backward``."""
    dX, dweights = _read_backward(site, du, X, gates)
    return dX, torch.cat((dweights, torch.zeros_like(dweights))).to(gates.dtype)


def seam(
    site: Site,
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    bias: torch.Tensor,
    shapes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::seam``."""
    h_pre, results = _mappings(site, bias, shapes)
    out, u = X.new_empty(X.shape), X.new_empty((*X.shape[:-2], site.channels))
    mappings = floats(h_post, h_res)
    site.run("static_seam", X, f, out, u, *mappings, mappings[0] if _given(site) else h_pre)
    return out, u, *results


def seam_backward(
    site: Site,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    bias: torch.Tensor,
) -> SeamGradients:
    """``mhc::seam_backward``; ``grads`` are those of its first four outputs."""
    dX_next, du, dh_post_next, dh_res_next = grads
    dX, df = X.new_empty(X.shape), f.new_empty(f.shape)
    by_token = products(site)
    weights = site.room(site.tokens, site.spec.streams)
    mappings = floats(h_post, h_res)
    given = (*mappings, mappings[0] if _given(site) else _weights(site, bias))
    site.run("static_seam_backward", dX_next, du, X, f, dX, df, *given, *by_token, weights)
    dh_pre = site.sum_rows(weights, weights[0])
    dh_post, dh_res = sum_products(site, by_token, h_post, h_res)
    if _given(site):
        dh_post[: site.spec.streams] = dh_pre
        dbias = _maps_backward(site, bias, None, dh_post_next, dh_res_next)
    else:
        dbias = _maps_backward(site, bias, dh_pre, dh_post_next, dh_res_next)
    return dX, df, dh_post, dh_res, site.room(0), dbias, site.room(0)


def _given(site: Site) -> bool:
    """Whether the streams are read by the first half of h_post."""
    return site.spec.single_pass


def products(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for every token's part of the gradients of h_post and h_res."""
    n = site.spec.streams
    mixes = constraint_of(site.spec).mixes
    return site.room(site.tokens, n), site.room(site.tokens if mixes else 0, n * n)


def sum_products(
    site: Site,
    by_token: tuple[torch.Tensor, torch.Tensor],
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of h_post and h_res from what `products` made room for."""
    n = site.spec.streams
    dh_post = site.sum_rows(by_token[0], h_post[-n:])
    if _given(site):
        dh_post = torch.cat((torch.zeros_like(dh_post), dh_post))
    if not constraint_of(site.spec).mixes:
        return dh_post, torch.zeros_like(h_res)
    return dh_post, site.sum_rows(by_token[1], h_res)


def head_weights(site: Site, bias: torch.Tensor) -> torch.Tensor:
    """The weights of a learned collapse."""
    weights = site.room(site.spec.streams)
    site.start("head_static_maps", *floats(bias), weights)
    return weights


def head_backward(
    site: Site, dx: torch.Tensor, X: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``mhc::collapse_backward``."""
    dX, dh_pre = _read_backward(site, dx, X, head_weights(site, bias))
    dbias = bias.new_empty(bias.shape)
    site.start("head_static_maps_backward", *floats(bias), dh_pre, dbias)
    return dX, site.room(0), dbias, site.room(0)


def _mappings(
    site: Site, bias: torch.Tensor, shapes: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """h_pre, then h_post, h_res and the empty saved."""
    h_pre, results = site.room(site.spec.streams), site.mappings(shapes)
    site.start("pre_static_maps", *floats(bias), h_pre, *results[:2])
    return h_pre, results


def _weights(site: Site, bias: torch.Tensor) -> torch.Tensor:
    n = site.spec.streams
    return _mappings(site, bias, ([site.spec.gates], [n, n], [0]))[0]


def _read_backward(
    site: Site, du: torch.Tensor, X: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dX = X.new_empty(X.shape)
    by_token = site.room(site.tokens, site.spec.streams)
    site.run("static_pre_backward", du, X, dX, *floats(weights), by_token)
    return dX, site.sum_rows(by_token, weights[: site.spec.streams])


def _maps_backward(
    site: Site,
    bias: torch.Tensor,
    dh_pre: torch.Tensor | None,
    dh_post: torch.Tensor,
    dh_res: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the bias; that of H_pre is a part of ``dh_post`` where it is None."""
    dbias = bias.new_empty(bias.shape)
    own = () if dh_pre is None else (dh_pre,)
    site.start("pre_static_maps_backward", *floats(bias), *own, *floats(dh_post, dh_res), dbias)
    return dbias
