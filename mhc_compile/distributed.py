"""What mHC needs of ``torch.distributed`` beyond what torch has itself.

DDP, FSDP2, tensor parallelism and pipelines are torch's own, around a converted model: convert,
parallelize, compile, shard. Here is only what they cannot know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.experimental import register_sharding

import mhc_compile.kernels.sharding  # noqa: F401 - DTensor learns the ops
from mhc_compile.convert import mhc_parameters
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.guard import CALL, RETURN
from mhc_compile.match import sites_of
from mhc_compile.site import MHCSite
from mhc_compile.split import Cut, PipelineSplit, split_stages

__all__ = [
    "Cut",
    "PipelineSplit",
    "all_reduce_gradients_",
    "check_ranks",
    "replicate_parameters_",
    "split_stages",
]

# The marker of a call does nothing with the parameter it is given, wherever that lies.
register_sharding(CALL)(lambda anchor, policy: [([], [Replicate(), None])])
register_sharding(RETURN)(lambda anchor: [([], [Replicate()])])

_OF_ONE_RANK = frozenset({"inner", "kernels", "on_eager", "recompute", "skip_passes"})
"""Settings that say how a rank computes, and not what: they may differ."""


def all_reduce_gradients_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sum the gradients of all mhc parameters over a sequence-parallel mesh, in place.

    Under sequence parallelism each rank of the tensor-parallel mesh mixes the streams of its own
    tokens, so that it holds a part of the gradient of every mhc parameter. Call this once a step,
    after the last backward and before gradients are clipped or used. Without sequence parallelism
    every rank has the whole gradient already, and this would count it several times.

    Args:
        model: a converted model; also one whose parameters FSDP2 has sharded over another mesh.
        mesh: the one-dimensional mesh over which the sequence is split.
    """
    gradients = [p.grad for _, p in mhc_parameters(model) if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if not local:
        return
    flat = torch.cat([gradient.flatten() for gradient in local])  # one message for all
    dist.all_reduce(flat, group=mesh.get_group())
    parts = torch.split(flat, [gradient.numel() for gradient in local])
    for gradient, part in zip(local, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def replicate_parameters_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every mhc parameter a DTensor that is replicated over ``mesh``, in place.

    For models whose trunk is a DTensor (a plan with ``use_local_output=False``). DTensor then sums
    their gradients itself: do not call `all_reduce_gradients_`. Compile such a model as a whole.

    Args:
        model: a converted model.
        mesh: the mesh of the trunk.
    """
    for module in model.modules():
        if isinstance(module, MHCSite):
            distribute_module(module, mesh)


@dataclass(frozen=True, slots=True)
class _Conversion:
    """What has to be the same on every rank."""

    config: Mapping[str, Any] | None
    """None if nothing is converted."""
    sites: Mapping[str, str]
    """Name of a site -> all that its ops are told."""


def check_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make sure that every rank has converted the same model in the same way.

    A rank with another number of Sinkhorn iterations trains along without an error, and another
    network. Call this on every rank after `mhc_compile.convert_`, before anything is parallelized.

    Args:
        model: the whole converted model.
        group: the ranks to compare; all if None.

    Raises:
        ConfigError: ranks were converted with different configurations, or not at all.
        UnsupportedGraphError: their sites differ.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, _conversion(model), group=group)
    first, *others = zip(dist.get_process_group_ranks(group), gathered, strict=True)
    for other in others:
        if other[1].config != first[1].config:
            raise ConfigError(
                "the ranks were converted with different configurations: "
                f"{_config_difference(first, other)}. Give every rank the same MHCConfig"
            )
    for other in others:
        if other[1].sites != first[1].sites:
            raise UnsupportedGraphError(
                f"the ranks do not have the same sites: {_site_difference(first, other)}. Build "
                "and convert the same model on every rank"
            )


def _conversion(model: nn.Module) -> _Conversion:
    hosts = [(name, found) for name, m in model.named_modules() if (found := sites_of(m))]
    sites = {
        f"{name}.{record.key}".lstrip("."): f"{found.site(record.key)}, {record.source}"
        for name, found in hosts
        for record in found.records
        if record.converted
    }
    given = hosts[0][1].config if hosts else None
    config = given and {key: value for key, value in given.items() if key not in _OF_ONE_RANK}
    return _Conversion(config, sites)


def _config_difference(first: tuple[int, _Conversion], other: tuple[int, _Conversion]) -> str:
    (a, mine), (b, theirs) = first, other
    if mine.config is None or theirs.config is None:
        plain, converted = (a, b) if mine.config is None else (b, a)
        return f"rank {plain} is not converted, rank {converted} is"
    differ = [name for name in mine.config if mine.config[name] != theirs.config[name]]
    return "; ".join(
        f"{name}={mine.config[name]!r} on rank {a}, {theirs.config[name]!r} on rank {b}"
        for name in differ
    )


def _site_difference(first: tuple[int, _Conversion], other: tuple[int, _Conversion]) -> str:
    (a, mine), (b, theirs) = (first[0], first[1].sites), (other[0], other[1].sites)
    name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
    counts = f"{len(mine)} on rank {a}, {len(theirs)} on rank {b}, where {name}"
    if name in mine and name in theirs:
        return f"{counts} is ({theirs[name]}) and not ({mine[name]})"
    return f"{counts} is {'missing' if name in mine else 'one more'}"
