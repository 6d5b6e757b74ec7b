"""Rows of stream that the Triton kernels of an op move, from the arguments they have.

Every kernel reads or writes each of its stream arguments once, as far as memory is concerned (that
the streams are found in a cache when a kernel reads them a second time is what its rule for tiles
is for). The tests count the same numbers in the interpreter. See `mhc_compile.kernels.traffic`.
"""

from dataclasses import dataclass

from mhc_compile.kernels.spec import REPLAYED, SiteSpec
from mhc_compile.kernels.traffic import least_rows
from mhc_compile.kernels.triton.emit import kernels
from mhc_compile.kernels.triton.emit_replay import replay_name
from mhc_compile.kernels.triton.text import Kernel

_STATES = ("X", "Y", "DX", "DY", "DX_MORE")
_FORMS = {
    "pre": ("pre", "pre_scan pre_mix", "static_pre"),
    "pre_backward": (
        "pre_backward_maps pre_backward_streams pre_backward_phi",
        "static_pre_backward",
    ),
    "pre_backward, more": ("pre_backward_maps pre_more_backward_streams pre_backward_phi",),
    "pre_backward_dz": ("pre_backward_maps pre_backward_streams",),
    "phi_backward": ("pre_backward_phi",),
    "post": ("post",),
    "mix": ("mix",),
    "post_backward": ("post_backward",),
    "post_backward_branch": ("post_backward_branch",),
    "post_backward_state": ("post_backward_state",),
    "seam": ("seam", "seam_scan pre_mix", "static_seam"),
    "seam_backward": (
        "seam_backward_maps seam_backward_streams seam_backward_phi",
        "static_seam_backward",
    ),
    "read": ("read_streams", "static_pre"),
    "read_backward": ("read_streams_backward", "static_pre_backward"),
    "seam_backward_dz": ("seam_backward_maps seam_backward_streams",),
    "phi_backward, seam": ("seam_backward_phi",),
    "seam_norm": ("seam_norm", "seam_scan seam_norm_mix"),
    "seam_norm_backward": ("seam_norm_backward_maps seam_norm_backward_streams seam_backward_phi",),
    "replay": (replay_name(REPLAYED, REPLAYED + 1),),
    "collapse": ("collapse_mean", "collapse_sum"),
    "learned collapse": ("head", "head_scan head_mix", "static_pre"),
    "learned collapse backward": (  # z and 1/r are made again
        "head head_backward_maps head_backward_streams head_backward_phi",
        "head_scan head_mix head_backward_maps head_backward_streams head_backward_phi",
        "static_pre_backward",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One way to run an op."""

    op: str
    kernels: tuple[str, ...]
    """Those that touch streams, in order; sums of small partial results may follow."""
    rows: int
    """That they move per token."""
    least: int
    """That any implementation has to move."""


def forms(spec: SiteSpec) -> list[Form]:
    """Every way that a site's ops can run on a GPU; which one is taken depends on C and T."""
    known, least = kernels(spec), least_rows(spec.streams)
    found = []
    for op, texts in _FORMS.items():
        if not _is_for(op, spec):
            continue
        for text in texts:
            names = [
                name
                for name in text.split()
                # In a single pass these touch no streams.
                if not (spec.single_pass and name.endswith(("_backward_maps", "_mix")))
            ]
            if all(name in known for name in names):
                rows = sum(kernel_rows(known[name], spec.streams) for name in names)
                found.append(Form(op=op, kernels=tuple(names), rows=rows, least=least[op]))
    return found


def _is_for(op: str, spec: SiteSpec) -> bool:
    """Whether sites of this kind have an op.

    Single passes read otherwise, are not parted, and leave norms to their branches.
    """
    if not spec.single_pass:
        return not op.startswith("read")
    others = ("learned", "phi_backward", "seam_norm")
    return not op.startswith(others) and not op.endswith("_dz")


def kernel_rows(kernel: Kernel, streams: int) -> int:
    """Rows per token of one kernel's stream arguments."""
    return sum(streams if name.rstrip("0123456789") in _STATES else 1 for name in kernel.streams)
