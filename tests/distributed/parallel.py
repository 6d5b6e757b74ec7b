"""What the ranks of the data- and tensor-parallel tests do."""

from collections.abc import Callable, Iterable

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

from mhc_compile.distributed import all_reduce_gradients_
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


def _alone() -> Trace:
    """The same training on one process; eager autograd through the ops."""
    model = fresh()
    trace = train_alone(model, compiled(model, "eager"))
    torch.compiler.reset()
    return trace


def _full(gradients: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, g.full_tensor() if isinstance(g, DTensor) else g) for name, g in gradients]


def _train(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    data: DeviceMesh | None = None,
    finish: Callable[[], None] = lambda: None,
) -> Trace:
    """Train on this rank's part of each batch.

    Args:
        model: holds the parameters.
        forward: what is called.
        data: the mesh over which batches are split; None for whole batches.
        finish: runs between backward and step.
    """
    trace, optimizer = Trace(), torch.optim.SGD(model.parameters(), RATE)
    parts, part = (data.size(), data.get_local_rank()) if data is not None else (1, 0)
    for step in range(STEPS):
        tokens, targets = (half.chunk(parts)[part] for half in batch(step))
        optimizer.zero_grad()
        loss = loss_of(forward(tokens), targets)
        loss.backward()
        finish()
        mean = loss.detach() / parts
        if data is not None:
            dist.all_reduce(mean, group=data.get_group())
        trace.add(float(mean), _full(named_gradients(model)))
        optimizer.step()
    torch.compiler.reset()
    return trace


def ddp(rank: int) -> Distance:
    """DDP without its graph cut (tests/distributed/test_wrappers.py has the refusal of the cut)."""
    del rank
    expected, mesh, model = _alone(), init_device_mesh("cpu", (2,)), fresh()
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(model)
    return _train(model, compiled(wrapped, "aot_eager"), mesh).distance(expected)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.get_submodule("layers"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp(rank: int) -> dict[str, Distance]:
    """FSDP2 around each layer, compiled as a whole and layer by layer."""
    del rank
    expected, mesh, found = _alone(), init_device_mesh("cpu", (2,)), {}
    for name in ("whole", "layers"):
        model = fresh()
        _shard(model, mesh)
        forward: Callable[[Tensor], Tensor] = model
        if name == "whole":
            forward = compiled(model, "aot_eager")
        else:
            compile_blocks_(model.get_submodule("layers"), "aot_eager")
        found[name] = _train(model, forward, mesh).distance(expected)
    return found


def _plan(*, sequence: bool) -> dict[str, ParallelStyle]:
    """Products split by columns, then by rows; with ``sequence`` the trunk split by tokens."""
    inside = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        f"layers.*.{name}": ColwiseParallel()
        for name in ("attention.q", "attention.k", "attention.v", "mlp.up")
    }
    for name in ("attention.out", "mlp.down"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=inside)
    if sequence:
        gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan |= {f"layers.*.{name}": gather for name in ("attention", "mlp")}
        plan |= {f"layers.*.{name}": SequenceParallel() for name in ("norm1", "norm2")}
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return plan


def tensor_parallel(rank: int) -> Distance:
    """A plan for the branches alone: every rank mixes all streams of all tokens."""
    del rank
    expected, mesh, model = _alone(), init_device_mesh("cpu", (2,)), fresh()
    parallelize_module(model, mesh, _plan(sequence=False))
    return _train(model, compiled(model, "aot_eager")).distance(expected)


def sequence_parallel(rank: int, summed: bool = True) -> Distance:
    """The trunk is split by tokens; ``summed`` says whether mhc gradients are, as they must be."""
    del rank
    expected, mesh, model = _alone(), init_device_mesh("cpu", (2,)), fresh()
    parallelize_module(model, mesh, _plan(sequence=True))

    def finish() -> None:
        if summed:
            all_reduce_gradients_(model, mesh)

    return _train(model, compiled(model, "aot_eager"), finish=finish).distance(expected)


def tensor_parallel_and_fsdp(rank: int) -> Distance:
    """A 2-D mesh: layers sharded over one dimension, sequence and products over the other."""
    del rank
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    expected, model = _alone(), fresh()
    parallelize_module(model, mesh["tp"], _plan(sequence=True))
    compile_blocks_(model.get_submodule("layers"), "aot_eager")
    _shard(model, mesh["dp"])

    def finish() -> None:
        all_reduce_gradients_(model, mesh["tp"])

    return _train(model, model, mesh["dp"], finish).distance(expected)
