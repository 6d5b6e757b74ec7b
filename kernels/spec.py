"""`SiteSpec`: everything static about one mHC site, and its text form.

Custom ops take tensors, numbers and strings, so a site travels through graphs as the short text
that `SiteSpec.encode` writes and `SiteSpec.decode` reads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from mhc_compile.errors import KernelError

MAX_STREAMS = 16
"""Largest number of residual streams."""

REPLAYED = 8
"""Sites that one kernel of ``mhc::replay`` takes at most: each has tensors of its own, and so pages
of memory."""

KERNELS = ("auto", "triton", "cpp", "reference")
"""What can compute the ops: the fastest that can, generated Triton or C++ or nothing else, plain
torch."""

EPS_PLACES = ("divisor", "entries", "both", "floor")
"""``M / (sum + eps)``; ``(M + eps) / sum(M + eps)``; ``(M + eps) / (sum + eps)``;
``M / max(sum, eps)``."""


BRANCH_NORMS = ("none", "rms", "layer")
"""What ``mhc::seam_norm`` does to a branch input: nothing, divide by its RMS, or subtract its mean
and divide by its deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSpec:
    """What the ops of one residual site need to know besides their tensors.

    A tensor of shape ``s`` with its channels on axis ``dim`` becomes a state of shape
    ``s[:dim] + (n,) + s[dim:]``: the stream axis stands directly before the channel axis.

    Raises:
        KernelError: a value is out of range.
    """

    streams: int
    """Number n of residual streams, 1 to `MAX_STREAMS`."""
    constraint: str = "sinkhorn"
    """Name of the manifold of H_res, see `mhc_compile.kernels.constraints`."""
    iters: int = 20
    """Column-then-row normalisations of the Sinkhorn constraints."""
    sinkhorn_eps: float = 0.0
    """Added to Sinkhorn divisors."""
    eps_at: str = "divisor"
    """Where "sinkhorn_exp" puts ``sinkhorn_eps``: one of `EPS_PLACES`."""
    pre_eps: float = 0.0
    """Added to the gate of H_pre and of the learned collapse."""
    norm_eps: float = 1e-6
    """Inside the root of the RMS norm; 0 leaves an all-zero token undefined."""
    dynamic: bool = True
    """Mappings depend on the token; otherwise they are the bias alone."""
    single_pass: bool = False
    """The streams are read with the H_pre of the site *before*, which stands in front of its
    H_post; so one scan of the state makes u and the mappings (DeepSeek-V4.1)."""
    dim: int = -1
    """Channel axis of the un-widened tensor, counted from the end."""
    kernels: str = "auto"
    """What computes the ops: one of `KERNELS`."""
    autotune: bool = False
    """Whether Triton kernels get the fastest of a few tiles, timed on their first run."""
    branch_norm: str = "none"
    """The norm that the branch starts with, where ``mhc::seam_norm`` applies it: one of
    `BRANCH_NORMS`."""
    branch_eps: float = 0.0
    """Inside the root of that norm."""
    branch_rounds: bool = False
    """Whether its result is rounded to the dtype of the streams before its weight is applied."""

    def __post_init__(self) -> None:
        """Check every field; see the class."""
        if self.kernels not in KERNELS:
            raise KernelError(
                f"kernels={self.kernels!r} is not allowed: use one of {', '.join(KERNELS)}"
            )
        if self.eps_at not in EPS_PLACES:
            raise KernelError(
                f"eps_at={self.eps_at!r} is not allowed: use one of {', '.join(EPS_PLACES)}"
            )
        if self.branch_norm not in BRANCH_NORMS:
            raise KernelError(
                f"branch_norm={self.branch_norm!r} is not allowed: use one of "
                f"{', '.join(BRANCH_NORMS)}"
            )
        _check_integer("streams", self.streams, 1, MAX_STREAMS)
        _check_integer("iters", self.iters, 1, math.inf)
        _check_integer("dim", self.dim, -math.inf, -1)
        for name in ("dynamic", "single_pass", "autotune", "branch_rounds"):
            if not isinstance(getattr(self, name), bool):
                raise KernelError(
                    f"{name}={getattr(self, name)!r} is not allowed: use True or False"
                )
        if not isinstance(self.constraint, str) or not self.constraint.isidentifier():
            raise KernelError(f"constraint={self.constraint!r} is not allowed: give its name")
        for name in ("sinkhorn_eps", "pre_eps", "norm_eps", "branch_eps"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0:
                raise KernelError(f"{name}={value!r} is not allowed: use a finite number >= 0")
            object.__setattr__(self, name, float(value))

    @property
    def gates(self) -> int:
        """Numbers per token in h_post: n, or 2 n with H_pre in front of H_post."""
        return 2 * self.streams if self.single_pass else self.streams

    @property
    def without_norm(self) -> "SiteSpec":
        """The site as the ops have it that leave branch inputs as they are."""
        return replace(self, branch_norm="none", branch_eps=0.0, branch_rounds=False)

    def encode(self) -> str:
        """Write the specification as text; fields at their default are left out.

        >>> SiteSpec(streams=4, dim=-3).encode()
        'n=4 constraint=sinkhorn dim=-3'
        """
        words = [f"n={self.streams}", f"constraint={self.constraint}"]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={value}")
        return " ".join(words)

    @staticmethod
    def decode(text: str) -> "SiteSpec":
        """Read what `encode` wrote; equal texts give the same object.

        Raises:
            KernelError: the text is not a specification.
        """
        return _decode(text)


@lru_cache(maxsize=1024)
def _decode(text: str) -> SiteSpec:
    values: dict[str, Any] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        name = "streams" if key == "n" else key
        if name not in _READERS or name in values:
            raise KernelError(f"{word!r} has no place in the site specification {text!r}")
        try:
            values[name] = _READERS[name](value)
        except ValueError as error:
            raise KernelError(f"{word!r} cannot be read in the specification {text!r}") from error
    if "streams" not in values:
        raise KernelError(f"{text!r} is no site specification: it lacks the streams, as in 'n=4'")
    return SiteSpec(**values)


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


_READERS: dict[str, Callable[[str], Any]] = {
    "streams": int,
    "constraint": str,
    "iters": int,
    "sinkhorn_eps": float,
    "eps_at": str,
    "pre_eps": float,
    "norm_eps": float,
    "dynamic": _read_bool,
    "single_pass": _read_bool,
    "dim": int,
    "kernels": str,
    "autotune": _read_bool,
    "branch_norm": str,
    "branch_eps": float,
    "branch_rounds": _read_bool,
}


def _check_integer(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        bounds = [f">= {low}"] * math.isfinite(low) + [f"<= {high}"] * math.isfinite(high)
        raise KernelError(f"{name}={value!r} is not allowed: use an integer {' and '.join(bounds)}")
