"""What the ranks of the pipeline tests do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch._functorch import config  # noqa: TID251 - a setting of torch's that its error names
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from mhc_compile.distributed import split_stages
from tests.distributed.models import (
    RATE,
    STEPS,
    Trace,
    batch,
    fresh,
    loss_of,
    named_gradients,
    train_alone,
)
from tests.nets import compiled

MICROBATCHES = 4
"""At least; DualPipeV wants as many as there are stages. Each is of one sequence."""
SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def _held(schedule: str, rank: int, world: int) -> list[int]:
    """The stages of a rank: one, every world-th one, or one on each leg of a V."""
    last = 2 * world - 1
    held = {"1f1b": [rank], "interleaved": [rank, rank + world]}
    return held.get(schedule, [rank, last - rank])


def train(rank: int, schedule: str, compiled_stages: bool = False) -> dict[str, float]:
    """Train a pipeline over all ranks; how far it is from one process."""
    world = dist.get_world_size()
    held = _held(schedule, rank, world)
    count = world * len(held)
    model, microbatches = fresh(count), max(MICROBATCHES, count)  # a layer for each stage
    expected = train_alone(model, compiled(model, "eager"), size=microbatches)
    torch.compiler.reset()
    split = split_stages(fresh(count), batch(0, 1)[0], stages=count)
    parts = [split.stages[number] for number in held]
    if compiled_stages:
        # Schedules with a V go through the backward of a stage twice: what it keeps must last.
        config.donated_buffer = schedule in ("1f1b", "interleaved")
        for part in parts:
            part.compile(backend="mhc", options={"inner": "aot_eager"})
    stages = [
        PipelineStage(part, number, len(split.stages), torch.device("cpu"))
        for part, number in zip(parts, held, strict=True)
    ]
    kind = SCHEDULES[schedule]
    plan = kind(stages if len(stages) > 1 else stages[0], microbatches, loss_fn=loss_of)
    found = _train(plan, parts, held, len(split.stages), microbatches)
    return found.distance(expected)


def _train(
    plan: Any,
    parts: Sequence[torch.nn.Module],
    held: Sequence[int],
    stages: int,
    size: int,
) -> Trace:
    trace, has_loss = Trace(), stages - 1 in held
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], RATE)
    for step in range(STEPS):
        tokens, targets = batch(step, size)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        inputs = (tokens,) if 0 in held else ()
        plan.step(*inputs, target=targets if has_loss else None, losses=losses)
        loss = float(torch.stack(losses).detach().mean()) if has_loss else None
        trace.add(loss, [pair for part in parts for pair in named_gradients(part)])
        optimizer.step()
    return trace
