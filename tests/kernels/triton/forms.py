"""Every op of a site run under the byte meter, in each form that its kernels have."""

from collections.abc import Callable, Iterator
from unittest import mock

import torch

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.ops_pre import coefficient_shapes
from mhc_compile.kernels.spec import REPLAYED, SiteSpec
from mhc_compile.kernels.triton import launch, site
from mhc_compile.kernels.triton.emit import kernels
from tests.kernels.triton.meter import Meter
from tests.kernels.triton.sites import Seam, make_seam, seam_outputs

Key = tuple[str, tuple[str, ...]]
"""An op, and those of its kernels that touch streams."""
_TWO_FORMS = ("pre", "seam", "learned collapse", "learned collapse backward")


def metered(
    spec: SiteSpec, tokens: int, channels: int, dtype: torch.dtype
) -> dict[Key, tuple[Meter, int]]:
    """Run all ops; gives the meter of each form, and the bytes of its stream arguments."""
    seam = make_seam(spec, tokens, channels, dtype=dtype)
    found = {}
    for whole in (True, False):
        with mock.patch.object(site, "one_launch", lambda *_, whole=whole: whole):
            for op, run in _runs(seam):
                if not whole and op not in _TWO_FORMS:
                    continue
                with Meter() as meter:
                    run()
                launched = [each.kernel for each in meter.launches]
                names = tuple(name for name in launched if kernels(spec)[name].streams)
                found[op, names] = meter, stream_bytes(spec, meter)
    return found


def stream_bytes(spec: SiteSpec, meter: Meter) -> int:
    """Compulsory bytes of the arguments that hold streams, over all launches."""
    return sum(
        access.compulsory
        for each in meter.launches
        for (argument, _), access in each.accesses.items()
        if argument in kernels(spec)[each.kernel].streams
    )


def _runs(seam: Seam) -> Iterator[tuple[str, Callable[[], object]]]:
    X, f, h_post, h_res, phi, bias, alpha = seam.given
    spec, n = seam.spec, seam.spec.streams
    shapes = coefficient_shapes(X, spec)
    saved = seam_outputs(seam)[-1]
    d_next, du, dh_post, dh_res = seam.grads
    head = (None, bias[:n], None)
    if phi is not None and alpha is not None:
        head = (torch.randn(n * X.shape[-1], n), bias[:n], alpha[:1])
    back = (d_next, du, dh_post, dh_res)
    gates = h_post if spec.single_pass else None
    yield "pre", lambda: launch.pre(X, phi, bias, alpha, spec, shapes, gates)
    of_pre = (du, dh_post, dh_res, X, phi, bias, alpha, saved, spec)
    yield "pre_backward", lambda: launch.pre_backward(*of_pre, gates=gates)
    if phi is not None:
        yield "pre_backward, more", lambda: launch.pre_backward(*of_pre, d_next, gates=gates)
    if phi is not None and gates is None:
        yield "pre_backward_dz", lambda: launch.pre_backward(*of_pre, with_dz=True)
        of_seam = (*back, *seam.given, saved, spec)
        yield "seam_backward_dz", lambda: launch.seam_backward(*of_seam, with_dz=True)
        dz = launch.pre_backward(*of_pre, with_dz=True)[1]
        none = (None, None, None)
        yield "phi_backward", lambda: launch.phi_backward(dz, X, *none, phi, spec)
        before = (f, h_post, h_res)
        yield "phi_backward, seam", lambda: launch.phi_backward(dz, X, *before, phi, spec)
    yield "post", lambda: launch.post(X, f, h_post, h_res, spec)
    if constraint_of(spec).mixes:
        yield "mix", lambda: launch.mix(X, h_res, spec)
    yield "post_backward", lambda: launch.post_backward(d_next, X, f, h_post, h_res, spec)
    yield (
        "post_backward_branch",
        lambda: launch.post_backward_branch(d_next, h_post, d_next.dtype, spec),
    )
    of_post = (d_next, X, f, h_post, h_res, spec)
    yield "post_backward_state", lambda: launch.post_backward_state(*of_post)
    yield "seam", lambda: seam_outputs(seam)
    if spec.dynamic and gates is None:
        many = ([f.clone() for _ in range(REPLAYED)], [h_post] * REPLAYED, [h_res] * REPLAYED)
        reads = ([saved] * (REPLAYED + 1), [bias] * (REPLAYED + 1), [alpha] * (REPLAYED + 1))
        yield "replay", lambda: launch.replay(X, *many, *reads, spec)
    yield "seam_backward", lambda: launch.seam_backward(*back, *seam.given, saved, spec)
    yield "collapse", lambda: launch.collapse(X, None, None, None, "mean", spec)
    yield "collapse", lambda: launch.collapse(X, None, None, None, "sum", spec)
    if gates is not None:
        yield "read", lambda: launch.read(X, gates, spec)
        yield "read_backward", lambda: launch.read_backward(f, X, gates, spec)
        return
    yield "learned collapse", lambda: launch.collapse(X, *head, "learned", spec)
    yield "learned collapse backward", lambda: launch.collapse_backward(f, X, *head, spec)
