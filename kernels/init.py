"""Initial parameters of a site and of the learned collapse.

"preserve" makes a freshly converted network compute what it computed before, and lets its streams
separate in training. From equal streams both need: rows of H_res that sum to 1, ``H_post = 1``, and
an H_pre that sums to 1 but is *not* uniform. With a uniform one every stream would get the same
gradient, and stay equal for ever. "paper" is appendix A.6 of arXiv 2512.24880, where H_pre sums to
1.09 at n = 4; it changes the outputs of branches that do not start with a norm.
"""

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec

INITS = ("preserve", "paper")
"""The ways `initial_parameters` can start."""

_ALPHA = 0.01  # the paper's value


def initial_parameters(
    spec: SiteSpec, width: int, init: str = "preserve", index: int = 0
) -> dict[str, torch.Tensor]:
    """Parameters of one site, in the shapes ``mhc::pre`` takes.

    Args:
        spec: the site.
        width: channels C of one stream.
        init: one of `INITS`.
        index: position of the site in its trunk; it rotates which stream the site reads most.

    Returns:
        ``bias`` and, if the site is dynamic, ``phi`` (zero) and ``alpha``; float32, on the CPU.

    Raises:
        KernelError: the constraint refuses the number of streams, or no gate reaches the wanted
            weights (a single stream would need ``sigmoid(h) = 1``).
    """
    if init not in INITS:
        raise KernelError(f"init={init!r} is not allowed: use one of {', '.join(INITS)}")
    constraint, n = constraint_of(spec), spec.streams
    if constraint.gate == "tanh":
        # Without a sigmoid the bias is the weight itself; that paper starts at a one-hot H_pre.
        weights = _one_hot(n, index) if init == "paper" else _descending(n, index)
        pre, post = weights - spec.pre_eps, torch.ones(n, dtype=torch.float64)
    else:
        post = torch.zeros(n, dtype=torch.float64)  # 2 sigmoid(0) = 1
        if init == "paper":
            pre = 6.0 * _one_hot(n, index) - 3.0
        else:
            pre = _gate_logits(_descending(n, index), spec)
    bias = torch.cat((pre, post, constraint.initial_bias(n, init))).float()
    if not spec.dynamic:
        return {"bias": bias}
    rows, columns = (width, bias.numel() // n) if constraint.per_stream else (n * width, len(bias))
    return {"phi": torch.zeros(rows, columns), "bias": bias, "alpha": torch.full((3,), _ALPHA)}


def initial_head(spec: SiteSpec, width: int) -> dict[str, torch.Tensor]:
    """Parameters of the learned collapse: weights of 1/n, which is the mean.

    Args:
        spec: a site of the trunk.
        width: channels C of one stream.

    Returns:
        ``bias`` and, if the site is dynamic, ``phi`` (zero) and ``alpha``; float32, on the CPU.

    Raises:
        KernelError: a single stream would need ``sigmoid(h) = 1``.
    """
    n = spec.streams
    bias = _gate_logits(torch.full((n,), 1.0 / n, dtype=torch.float64), spec).float()
    if not spec.dynamic:
        return {"bias": bias}
    return {"phi": torch.zeros(n * width, n), "bias": bias, "alpha": torch.full((1,), _ALPHA)}


def _descending(streams: int, index: int) -> torch.Tensor:
    """``[n, n-1, ..., 1]`` over their sum, rotated: 0.4, 0.3, 0.2, 0.1 at n = 4."""
    weights = torch.arange(streams, 0, -1, dtype=torch.float64)
    return (weights / weights.sum()).roll(index % streams)


def _one_hot(streams: int, index: int) -> torch.Tensor:
    return torch.eye(streams, dtype=torch.float64)[index % streams]


def _gate_logits(weights: torch.Tensor, spec: SiteSpec) -> torch.Tensor:
    """The h with ``sigmoid(h) + pre_eps = weights``."""
    gate = weights - spec.pre_eps
    low, high = gate.min().item(), gate.max().item()
    if not 0.0 < low <= high < 1.0:
        reason = "pre_eps is too large" if low <= 0.0 else "a sigmoid stays below 1"
        raise KernelError(
            f"{spec.streams} streams with pre_eps={spec.pre_eps} cannot start from the weights "
            f"{[round(w, 4) for w in weights.tolist()]}: {reason}. "
            + ("Leave a single stream as a plain add" if spec.streams == 1 else "Lower pre_eps")
        )
    return torch.logit(gate)
