"""What the ranks of the data- and tensor-parallel tests do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mhc_compile.distributed import all_reduce_gradients_, replicate_parameters_
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
from tests.nets import compile_blocks_, compiled

Distance = dict[str, float]


@dataclass(frozen=True, slots=True)
class Job:
    """A model laid out over ranks, ready to train."""

    model: nn.Module
    """Holds the parameters."""
    forward: Callable[[Tensor], Tensor]
    """What is called."""
    data: DeviceMesh | None = None
    """The mesh over which batches are split; None for whole batches."""
    sequence: DeviceMesh | None = None
    """The mesh over which the sequence is split."""

    def step(self, number: int) -> float:
        """Forward and backward of a step; the mean loss over all ranks."""
        parts, part = (self.data.size(), self.data.get_local_rank()) if self.data else (1, 0)
        tokens, targets = (half.chunk(parts)[part] for half in batch(number))
        loss = loss_of(self.forward(tokens), targets)
        loss.backward()
        if self.sequence is not None:
            all_reduce_gradients_(self.model, self.sequence)
        mean = loss.detach() / parts
        if self.data is not None:
            dist.all_reduce(mean, group=self.data.get_group())
        return float(mean)


def _alone() -> Trace:
    """The same training on one process; eager autograd through the ops."""
    model = fresh()
    trace = train_alone(model, compiled(model, "eager"))
    torch.compiler.reset()
    return trace


def _mesh() -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _full(gradients: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, g.full_tensor() if isinstance(g, DTensor) else g) for name, g in gradients]


def _train(job: Job) -> Trace:
    trace, optimizer = Trace(), torch.optim.SGD(job.model.parameters(), RATE)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = job.step(number)
        trace.add(loss, _full(named_gradients(job.model)))
        optimizer.step()
    torch.compiler.reset()
    return trace


def ddp(rank: int) -> Distance:
    """DDP without its graph cut (tests/distributed/test_wrappers.py has the refusal of the cut)."""
    del rank
    expected, mesh, model = _alone(), _mesh(), fresh()
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(model)
    return _train(Job(model, compiled(wrapped, "aot_eager"), data=mesh)).distance(expected)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp_job(*, whole: bool = False) -> Job:
    """FSDP2 around each layer, over all ranks; compiled as a whole or layer by layer."""
    mesh, model = _mesh(), fresh()
    _shard(model, mesh)
    if whole:
        return Job(model, compiled(model, "aot_eager"), data=mesh)
    compile_blocks_(model.get_submodule("layers").children(), "aot_eager")
    return Job(model, model, data=mesh)


def fsdp(rank: int) -> dict[str, Distance]:
    """FSDP2, compiled in both ways."""
    del rank
    expected = _alone()
    return {str(whole): _train(fsdp_job(whole=whole)).distance(expected) for whole in (True, False)}


def _plan(*, sequence: bool, local: bool = True) -> dict[str, ParallelStyle]:
    """Products split by columns, then by rows; with ``sequence`` the trunk split by tokens.

    ``local`` says whether the trunk is made of plain tensors, or of DTensors.
    """
    inside = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        f"layers.*.{name}": ColwiseParallel()
        for name in ("attention.q", "attention.k", "attention.v", "mlp.up")
    }
    for name in ("attention.out", "mlp.down"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=inside, use_local_output=local)
    if sequence:
        gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan |= {f"layers.*.{name}": gather for name in ("attention", "mlp")}
        plan |= {f"layers.*.{name}": SequenceParallel() for name in ("norm1", "norm2")}
        plan["embed"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=local
        )
        plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return plan


def tensor_parallel(rank: int) -> Distance:
    """A plan for the branches alone: every rank mixes all streams of all tokens."""
    del rank
    expected, mesh, model = _alone(), _mesh(), fresh()
    parallelize_module(model, mesh, _plan(sequence=False))
    return _train(Job(model, compiled(model, "aot_eager"))).distance(expected)


def sequence_parallel(rank: int, summed: bool = True, inner: str = "aot_eager") -> Distance:
    """The trunk is split by tokens; ``summed`` says whether mhc gradients are, as they must be."""
    del rank
    expected, mesh, model = _alone(), _mesh(), fresh()
    parallelize_module(model, mesh, _plan(sequence=True))
    job = Job(model, compiled(model, inner), sequence=mesh if summed else None)
    return _train(job).distance(expected)


def dtensor_trunk(rank: int) -> Distance:
    """The trunk and the mhc parameters are DTensors: DTensor sums the gradients by itself."""
    del rank
    expected, mesh, model = _alone(), _mesh(), fresh()
    parallelize_module(model, mesh, _plan(sequence=True, local=False))
    replicate_parameters_(model, mesh)
    return _train(Job(model, compiled(model, "aot_eager"))).distance(expected)


def two_dimensional_job() -> Job:
    """Layers sharded over one dimension of a mesh, sequence and products split over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = fresh()
    parallelize_module(model, mesh["tp"], _plan(sequence=True))
    compile_blocks_(model.get_submodule("layers").children(), "aot_eager")
    _shard(model, mesh["dp"])
    return Job(model, model, data=mesh["dp"], sequence=mesh["tp"])


def tensor_parallel_and_fsdp(rank: int) -> Distance:
    """The documented order: convert, parallelize, compile, shard."""
    del rank
    expected = _alone()
    return _train(two_dimensional_job()).distance(expected)
