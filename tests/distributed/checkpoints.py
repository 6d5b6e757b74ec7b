"""What the ranks of the checkpoint and fault tests do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mhc_compile import MHCConfig, MHCError, convert_
from mhc_compile.distributed import check_ranks
from tests.distributed.models import Transformer, batch, fresh
from tests.distributed.parallel import Job, fsdp_job, two_dimensional_job
from tests.nets import compiled


def _alone_job() -> Job:
    model = fresh()
    return Job(model, compiled(model, "eager"))


LAYOUTS: dict[str, Callable[[], Job]] = {
    "alone": _alone_job,
    "fsdp": fsdp_job,
    "two dimensions": two_dimensional_job,
}


def train(
    rank: int, layout: str, folder: str, first: int, last: int, dies_at: int | None = None
) -> tuple[list[float], list[str]]:
    """Train steps ``first`` to ``last``, writing a checkpoint after each.

    Args:
        rank: of this process.
        layout: one of `LAYOUTS`.
        folder: holds the checkpoints, by the number of the next step.
        first: the step to begin with; above 0 its checkpoint is loaded.
        last: the step to end before.
        dies_at: the step in which the last rank is killed.

    Returns:
        Losses, and the names of all parameters that a checkpoint holds.
    """
    job = LAYOUTS[layout]()
    if first:
        with torch.no_grad():  # what is not loaded will show
            for parameter in job.model.parameters():
                parameter.zero_()
    optimizer = torch.optim.AdamW(job.model.parameters(), 0.01)
    if first:
        _load(job.model, optimizer, Path(folder) / str(first))
    losses = []
    for number in range(first, last):
        if number == dies_at and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        losses.append(job.step(number))
        optimizer.step()
        names = _save(job.model, optimizer, Path(folder) / str(number + 1))
    return losses, names


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> list[str]:
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    return sorted(weights)


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def convert_differently(rank: int, what: str) -> tuple[str, str]:
    """Convert another thing on rank 1 and compare: the kind of the error and its text."""
    is_other = rank == 1
    model = Transformer(1 if what == "layers" and is_other else 2)
    if not (what == "converted" and is_other):
        iters = 10 if what == "iterations" and is_other else 20
        inner = "eager" if is_other else "inductor"  # says how, not what: may differ
        convert_(model, batch(0)[0], config=MHCConfig(sinkhorn_iters=iters, inner=inner))
    try:
        check_ranks(model)
    except MHCError as error:
        return type(error).__name__, str(error)
    return "", ""
