"""How the ops act on sharded tensors: rules for DTensor, which has none for ops of others.

Every op works token by token. With state, branch input, branch output and mappings sharded over the
same tokens it needs no communication; parameters are replicated, and each rank has a part of their
gradient. Streams and channels are never split. Importing this module registers the rules.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from mhc_compile.kernels import (
    ops_ends,
    ops_post,
    ops_pre,
    ops_read,
    ops_seam,
    ops_seam_norm,
    ops_sinkhorn,
)
from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec

Placements = list[Placement | None]

_MODULES = (
    ops_ends,
    ops_post,
    ops_pre,
    ops_read,
    ops_seam,
    ops_seam_norm,
    ops_sinkhorn,
)  # they define the ops

# Results and arguments of each op. A state is [..., n, C] (or another layout), a narrow tensor what
# the un-widened model has; h_post, h_res and saved are by token if the site is dynamic. A leading d
# is a gradient; "-" is no tensor.
_PARAMETERS = "param param param"
_GRADIENTS = "dparam dparam dparam"
_OPS = {
    "expand": ("state", "narrow - -"),
    "expand_backward": ("narrow", "state -"),
    "collapse": ("narrow", f"state {_PARAMETERS} - -"),
    "collapse_backward": (f"state {_GRADIENTS}", f"narrow state {_PARAMETERS} -"),
    "pre": ("narrow h_post h_res saved", f"state {_PARAMETERS} - h_post"),
    "pre_backward": (
        f"state {_GRADIENTS} dh_post",
        f"narrow dh_post dh_res state {_PARAMETERS} saved - state h_post",
    ),
    "read": ("narrow", "state h_post -"),
    "read_backward": ("state dh_post", "narrow state h_post -"),
    "post": ("state", "state narrow h_post h_res -"),
    "post_backward": ("state narrow dh_post dh_res", "state state narrow h_post h_res -"),
    "seam": (
        "state narrow h_post h_res saved",
        f"state narrow h_post h_res {_PARAMETERS} -",
    ),
    "seam_backward": (
        f"state narrow dh_post dh_res {_GRADIENTS}",
        f"state narrow dh_post dh_res state narrow h_post h_res {_PARAMETERS} saved -",
    ),
    "seam_norm": (
        "state narrow h_post h_res saved saved",
        f"state narrow h_post h_res {_PARAMETERS} weight shift -",
    ),
    "seam_norm_backward": (
        f"state narrow dh_post dh_res {_GRADIENTS} dweight dshift",
        f"state narrow dh_post dh_res state narrow h_post h_res {_PARAMETERS} weight shift "
        "saved saved -",
    ),
}


def _rules(name: str, arguments: tuple[Any, ...]) -> list[tuple[Placements, Placements]]:
    """The placements that an op takes on one dimension of a mesh: replicated, or by one token axis.

    Args:
        name: of the op.
        arguments: as it was called, with something that has ``ndim`` in the place of tensors.
    """
    results, inputs = (roles.split() for roles in _OPS[name])
    given = dict(zip(range(len(arguments)), inputs, strict=False))  # the last may have a default
    is_given = [at in given and arguments[at] is not None for at in range(len(inputs))]
    absent = {f"d{role}" for role, there in zip(inputs, is_given, strict=True) if not there}
    results = ["dparam" if role in absent else role for role in results]  # empty
    dim, site = _layout(name, arguments)
    rank = next(
        arguments[position].ndim + (role == "narrow")
        for position, role in given.items()
        if role in ("state", "narrow")
    )
    streams, channels = rank + dim - 1, rank + dim
    axes = [axis for axis in range(rank) if axis not in (streams, channels)]
    found = []
    for token, axis in [(None, None), *enumerate(axes)]:
        found.append(
            (
                [_place(role, token, axis, streams, site) for role in results],
                [
                    None if arguments[at] is None else _place(role, token, axis, streams, site)
                    for at, role in given.items()
                ],
            )
        )
    return found


def _layout(name: str, arguments: tuple[Any, ...]) -> tuple[int, SiteSpec | None]:
    """The channel axis, and the specification of ops that have one."""
    if name.startswith("expand"):
        return arguments[-1], None
    site = SiteSpec.decode(next(a for a in reversed(arguments) if isinstance(a, str)))
    return site.dim, site


def _place(
    role: str, token: int | None, axis: int | None, streams: int, site: SiteSpec | None
) -> Placement | None:
    """Where one tensor lies if states are sharded over ``axis``, the ``token``-th token axis."""
    if role == "-":
        return None
    if token is None or axis is None:
        return Replicate()
    if role == "state":
        return Shard(axis)
    if role == "narrow":
        return Shard(axis if axis < streams else axis - 1)
    kind = role.removeprefix("d")
    shared = kind in ("param", "weight", "shift")
    by_token = site is not None and site.dynamic and not shared
    if kind == "h_res" and site is not None:
        by_token = by_token and constraint_of(site).mixes
    if by_token:
        return Shard(token)
    return Partial() if role.startswith("d") else Replicate()


def _register(name: str) -> None:
    def rules(*arguments: Any) -> list[tuple[Placements, Placements]]:
        return _rules(name, arguments)

    op = getattr(torch.ops.mhc, name).default
    register_sharding(op)(rules)


for _name in _OPS:
    _register(_name)
