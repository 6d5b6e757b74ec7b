"""`Maps`: the sizes of one projection of the streams onto the weights that a kernel applies."""

from dataclasses import dataclass

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.constraints.base import Gate
from mhc_compile.kernels.layout import dz_width
from mhc_compile.kernels.spec import SiteSpec

VECTOR_BYTES = 16
"""Bytes that one thread reads or writes at once where the channels allow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Maps:
    """What a site's mappings, or those of a learned collapse, look like to the emitter."""

    prefix: str
    """Begin of the names of its kernels: "pre" or "head"."""
    streams: int
    groups: tuple[int, ...]
    """Logits that share one scale: pre, post and res, or those of a head alone."""
    norms: int
    """Norms per token, n if each stream is projected on its own, and accumulators of products."""
    gate: Gate
    mixes: bool
    pre_eps: float
    norm_eps: float
    given: bool = False
    """A single pass: the streams are weighed by numbers that came with the gates."""

    @property
    def width(self) -> int:
        """Logits m per token."""
        return sum(self.groups)

    @property
    def columns(self) -> int:
        """Columns of phi."""
        return self.width // self.norms

    @property
    def padded(self) -> int:
        """Columns of a tile of phi: a power of two that ``tl.dot`` takes."""
        return max(16, power_of_two(self.columns))

    @property
    def saved(self) -> int:
        """Numbers per token that the backward is left: z and 1/r."""
        return self.width + self.norms

    @property
    def partial(self) -> int:
        """Stride of z and the sums of squares from one slice of the channels."""
        return -(-self.saved // 4) * 4

    @property
    def work(self) -> int:
        """Stride of dz, the factors of x in dX, and H_pre, from one backward kernel to the next."""
        return dz_width(self.saved, self.streams)


def site_maps(spec: SiteSpec) -> Maps:
    """The mappings of ``mhc::pre``."""
    constraint, n = constraint_of(spec), spec.streams
    return Maps(
        prefix="pre",
        streams=n,
        groups=(n, n, constraint.logits(n)),
        norms=n if constraint.per_stream else 1,
        gate=constraint.gate,
        mixes=constraint.mixes,
        pre_eps=spec.pre_eps,
        norm_eps=spec.norm_eps,
        given=spec.single_pass,
    )


def head_maps(spec: SiteSpec) -> Maps:
    """The mapping of a learned ``mhc::collapse``."""
    return Maps(
        prefix="head",
        streams=spec.streams,
        groups=(spec.streams,),
        norms=1,
        gate="sigmoid",
        mixes=False,
        pre_eps=spec.pre_eps,
        norm_eps=spec.norm_eps,
    )


def maps_of(kernel: str, spec: SiteSpec) -> Maps:
    """The mappings that a kernel of this name is about."""
    return head_maps(spec) if kernel.startswith("head") else site_maps(spec)


def vector(dtype: torch.dtype) -> int:
    """Stream elements that one thread reads at once."""
    return VECTOR_BYTES // dtype.itemsize


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()
