"""Train one small GPT with hyper-connections on a mesh of processes.

Data parallel (FSDP2), tensor parallel with sequence parallelism, and pipelines, from the same model
and the same call of ``convert_``. What is left of the processes after ``--tp`` and ``--pp`` is data
parallel.

    torchrun --nproc-per-node 4 examples/train_distributed.py --tp 2
    torchrun --nproc-per-node 4 examples/train_distributed.py --pp 2 --schedule zbv
    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint run1 --steps 20
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from train_gpt import CONTEXT, VOCABULARY, corpus

import mhc_compile
from mhc_compile.distributed import all_reduce_gradients_, check_ranks, split_stages

MICROBATCHES = 4
SCHEDULES = {"1f1b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Attention(nn.Module):
    """Causal self-attention; a rank holds whole heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x`` (batch, time, width) over time."""
        q, k, v = (
            part(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two products with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token of ``x`` (batch, time, width)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One pre-norm layer: two residual sites."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP to ``x`` (batch, time, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level language model; it learns positions from the causal mask alone."""

    def __init__(self, layers: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the byte after each of ``tokens`` (batch, time)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Job:
    """A laid out model: the modules of this rank, and what a step runs on a batch of this rank."""

    modules: Sequence[nn.Module]
    step: Callable[[Tensor, Tensor], Tensor | None]
    """Forward and backward; the loss, on ranks that see it."""


def sharded(model: GPT, mesh: DeviceMesh, options: argparse.Namespace) -> Job:
    """Tensor parallel over "tp", compiled block by block, FSDP2 over "dp"."""
    if mesh["tp"].size() > 1:
        parallelize_module(model, mesh["tp"], plan())
    for block in model.blocks:
        block.compile(backend="mhc", options={"inner": options.inner})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(model(tokens), targets)
        loss.backward()
        if mesh["tp"].size() > 1:  # each rank has mixed the streams of its own tokens
            all_reduce_gradients_(model, mesh["tp"])
        return loss.detach()

    return Job([model], step)


def plan() -> dict[str, Any]:
    """Products split by columns, then by rows; the trunk between them split by tokens."""
    gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    styles: dict[str, Any] = {f"blocks.*.{name}": gather for name in ("attention", "mlp")}
    styles |= {f"blocks.*.{name}": SequenceParallel() for name in ("norm1", "norm2")}
    for name in ("attention.q", "attention.k", "attention.v", "mlp.up"):
        styles[f"blocks.*.{name}"] = ColwiseParallel()
    for name in ("attention.out", "mlp.down"):
        styles[f"blocks.*.{name}"] = RowwiseParallel(output_layouts=Shard(1))
    styles["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    styles["norm"] = SequenceParallel()
    styles["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return styles


def pipelined(model: GPT, mesh: DeviceMesh, options: argparse.Namespace) -> Job:
    """Stages over "pp", each sharded over "dp"."""
    ranks, rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
    is_v = options.schedule != "1f1b"
    held = [rank, 2 * ranks - 1 - rank] if is_v else [rank]
    device = next(model.parameters()).device
    share = options.batch // mesh["dp"].size() // MICROBATCHES
    microbatch = torch.zeros(share, CONTEXT, dtype=torch.long, device=device)
    split = split_stages(model, microbatch, stages=ranks * len(held))
    if dist.get_rank() == 0:
        print(f"{len(split.stages)} stages, {split.bytes_per_token} bytes a token over all edges")
    modules = [split.stages[number] for number in held]
    if not is_v:  # of a compiled stage no schedule can defer the gradients of weights
        for module in modules:
            module.compile(backend="mhc", options={"inner": options.inner})
    for module in modules:
        fully_shard(module, mesh=mesh["dp"])
    stages = [
        PipelineStage(module, number, len(split.stages), device, group=mesh["pp"].get_group())
        for module, number in zip(modules, held, strict=True)
    ]
    schedule: Any = SCHEDULES[options.schedule]
    schedule = schedule(stages if is_v else stages[0], MICROBATCHES, loss_fn=loss_of)
    is_last = len(split.stages) - 1 in held

    def step(tokens: Tensor, targets: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        inputs = (tokens,) if 0 in held else ()
        schedule.step(*inputs, target=targets if is_last else None, losses=losses)
        return torch.stack(losses).detach().mean() if is_last else None

    return Job(modules, step)


def state_of(job: Job, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights and moments under the names of the whole model: the same for every layout."""
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    for module, optimizer in zip(job.modules, optimizers, strict=True):
        weights, moments = get_state_dict(module, optimizer, options=FLAT)
        state["model"] |= weights
        state["optimizer"] |= moments
    return state


def resume(job: Job, optimizers: Sequence[torch.optim.Optimizer], folder: str) -> None:
    """Load a checkpoint of any layout."""
    state = state_of(job, optimizers)
    checkpoint.load(state, checkpoint_id=folder)
    for module, optimizer in zip(job.modules, optimizers, strict=True):
        weights, moments = get_state_dict(module, optimizer, options=FLAT)
        set_state_dict(
            module,
            optimizer,
            model_state_dict={name: state["model"][name] for name in weights},
            optim_state_dict={name: state["optimizer"][name] for name in moments},
            options=FLAT,
        )


def batch_of(text: Tensor, step: int, options: argparse.Namespace) -> Tensor:
    """The windows (batch, time + 1) of one step: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (options.batch,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).long()


def train(options: argparse.Namespace) -> None:
    """Lay the model out, train it, print the losses on rank 0."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = dist.get_world_size() // (options.tp * options.pp)
    shape = (options.pp, data, options.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "tp"))

    torch.manual_seed(0)
    model, text = GPT(options.layers).to(device), corpus()
    example = batch_of(text, 0, options)[:, :-1].to(device)
    config = mhc_compile.MHCConfig(streams=options.streams, inner=options.inner)
    mhc_compile.convert_(model, example, config=config)
    check_ranks(model)
    job = (pipelined if options.pp > 1 else sharded)(model, mesh, options)
    optimizers = [torch.optim.AdamW(module.parameters(), options.lr) for module in job.modules]
    if options.resume:
        resume(job, optimizers, options.resume)

    for number in range(options.first, options.first + options.steps):
        window = batch_of(text, number, options).chunk(data)[mesh["dp"].get_local_rank()].to(device)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = job.step(window[:, :-1], window[:, 1:])
        for optimizer in optimizers:
            optimizer.step()
        seen = torch.zeros(2, device=device)  # sum of losses, and how many ranks have one
        if loss is not None:
            seen += torch.stack((loss, torch.ones_like(loss)))
        dist.all_reduce(seen)
        if dist.get_rank() == 0:
            print(f"step {number} loss {float(seen[0] / seen[1]):.6f}", flush=True)
    if options.checkpoint:
        checkpoint.save(state_of(job, optimizers), checkpoint_id=options.checkpoint)
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pp", type=int, default=1, help="ranks that hold a part of the layers")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b", help="of --pp")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    parser.add_argument("--checkpoint", help="folder to write at the end")
    parser.add_argument("--resume", help="folder to begin with; any layout may have written it")
    options = parser.parse_args(argv)
    if options.tp > 1 and options.pp > 1:
        parser.error(
            "--tp and --pp exclude each other: a stage is an exported graph of plain tensors"
        )
    train(options)


if __name__ == "__main__":
    main()
