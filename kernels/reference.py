"""The eager truth: each op written from the equations, differentiated by autograd.

Numbers in parentheses are equations of arXiv 2512.24880. Nothing here is fast, fused or shared with
the ops, except the constraints' own formulas; tests compare the ops with it in float64. Layouts are
those of `mhc_compile.kernels.layout`.
"""

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec


def expand_ref(x: torch.Tensor, streams: int, dim: int) -> torch.Tensor:
    """Replicate ``x`` into ``streams`` streams before its axis ``dim``."""
    return torch.stack([x] * streams, dim - 1)


def pre_ref(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
    gates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Branch input, H_post and H_res of one site; arguments and results as for ``mhc::pre``.

    The last result of ``mhc::pre``, what it saves for its backward, has no counterpart here.
    """
    n, constraint = spec.streams, constraint_of(spec)
    x = _channels_last(X, spec)
    bias = bias.to(x.dtype)
    if phi is None or alpha is None:
        h = bias
    else:
        phi, alpha = phi.to(x.dtype), alpha.to(x.dtype)
        scale = torch.repeat_interleave(alpha, torch.tensor([n, n, len(bias) - 2 * n]))
        if constraint.per_stream:
            r = _rms(x, spec.norm_eps)
            hidden = ((x / r) @ phi).mT.flatten(-2)  # columns [pre | post | res row-major]
        else:
            vec = x.flatten(-2)
            hidden = (vec @ phi) / _rms(vec, spec.norm_eps)  # (14), (15)
        if constraint.gate == "tanh":
            hidden = hidden.tanh()
        h = scale * hidden + bias  # (16)
    pre, post, res = h[..., :n], h[..., n : 2 * n], h[..., 2 * n :]
    if constraint.gate == "sigmoid":
        pre, post = pre.sigmoid(), 2 * post.sigmoid()  # (17), (18)
    h_res = constraint.matrix(res if constraint.mixes else bias[2 * n :], spec)  # (19)
    pre = pre + spec.pre_eps
    if spec.single_pass:
        return read_ref(X, gates, spec), torch.cat((pre, post), -1), h_res
    u = torch.einsum("...n,...nc->...c", pre, x)
    return u.movedim(-1, spec.dim).to(X.dtype), post, h_res


def post_ref(
    X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, spec: SiteSpec
) -> torch.Tensor:
    """The next state, ``H_res X + H_post^T f``: equation (3) with the branch output given."""
    x = _channels_last(X, spec)
    branch = f.movedim(spec.dim, -1).to(x.dtype)
    mixed = torch.einsum("...ij,...jc->...ic", h_res.to(x.dtype), x)
    h_post = h_post[..., -spec.streams :].to(x.dtype)  # behind H_pre in a single pass
    out = mixed + h_post[..., None] * branch[..., None, :]
    return out.movedim((-2, -1), (spec.dim - 1, spec.dim)).to(X.dtype)


def seam_ref(
    X: torch.Tensor,
    f: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor,
    alpha: torch.Tensor | None,
    spec: SiteSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next state, and what `pre_ref` makes of it; arguments as for ``mhc::seam``."""
    X_next = post_ref(X, f, h_post, h_res, spec)
    gates = h_post if spec.single_pass else None
    return (X_next, *pre_ref(X_next, phi, bias, alpha, spec, gates))


def branch_norm_ref(
    u: torch.Tensor, weight: torch.Tensor | None, shift: torch.Tensor | None, spec: SiteSpec
) -> torch.Tensor:
    """What ``mhc::seam_norm`` makes of a branch input: torch's own norms, in the dtype of ``u``."""
    rows, size = u.movedim(spec.dim, -1), (u.shape[spec.dim],)
    if spec.branch_norm == "layer":
        out = torch.nn.functional.layer_norm(rows, size, weight, shift, spec.branch_eps)
    else:
        out = torch.nn.functional.rms_norm(rows, size, weight, spec.branch_eps)
        out = out if shift is None else out + shift
    return out.movedim(-1, spec.dim)


def collapse_ref(
    X: torch.Tensor,
    phi: torch.Tensor | None,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    mode: str,
    spec: SiteSpec,
) -> torch.Tensor:
    """One tensor of all streams; arguments as for ``mhc::collapse``."""
    x = _channels_last(X, spec)
    if bias is None:
        out = x.mean(-2) if mode == "mean" else x.sum(-2)
    else:
        h = bias.to(x.dtype)
        if phi is not None and alpha is not None:
            vec = x.flatten(-2)
            h = alpha.to(x.dtype) * (vec @ phi.to(x.dtype)) / _rms(vec, spec.norm_eps) + h
        out = torch.einsum("...n,...nc->...c", h.sigmoid() + spec.pre_eps, x)
    return out.movedim(-1, spec.dim).to(X.dtype)


def read_ref(X: torch.Tensor, gates: torch.Tensor | None, spec: SiteSpec) -> torch.Tensor:
    """The streams weighed by H_pre of the site before; arguments as for ``mhc::read``."""
    x, n = _channels_last(X, spec), spec.streams
    weights = torch.eye(n, dtype=x.dtype)[0] if gates is None else gates[..., :n].to(x.dtype)
    u = torch.einsum("...n,...nc->...c", weights, x)
    return u.movedim(-1, spec.dim).to(X.dtype)


def sinkhorn_ref(logits: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """The projection alone, ``[..., n, n]`` to ``[..., n, n]``."""
    return constraint_of(spec).matrix(logits.flatten(-2), spec)


def _channels_last(X: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """The state as ``[tokens..., n, C]`` in the coefficient dtype."""
    dtype = torch.float64 if X.dtype == torch.float64 else torch.float32
    return X.movedim((spec.dim - 1, spec.dim), (-2, -1)).to(dtype)


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()
