"""DistributedDataParallel and FSDP2 around converted models, one process each."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile import NotCompiledError, UnsupportedGraphError
from mhc_compile.distributed import replicate_parameters_
from tests.nets import Net, assert_same, compile_blocks_, compiled, converted, example, run


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_graph_that_ddp_cuts_is_refused_with_the_advice() -> None:
    x = torch.randn(2, 512)  # wide enough for more than one bucket
    model = DistributedDataParallel(converted(Net(width=512), x), bucket_cap_mb=1)
    with pytest.raises(UnsupportedGraphError, match=r"optimize_ddp = False"):
        compiled(model)(x)


@torch._dynamo.config.patch(optimize_ddp=False)
def test_without_the_cut_ddp_computes_the_same() -> None:
    x = example()
    model = converted(Net(), x)
    expected = run(compiled(model, "aot_eager"), model, x)
    wrapped = DistributedDataParallel(model)
    assert_same(run(compiled(wrapped, "aot_eager"), model, x), expected)
    with pytest.raises(NotCompiledError):
        wrapped(x)


def test_blocks_compiled_one_by_one_need_no_setting_under_ddp() -> None:
    x = example()
    model = converted(Net(), x)
    expected = run(compiled(model, "aot_eager"), model, x)
    compile_blocks_(model.blocks, "aot_eager")
    assert_same(run(DistributedDataParallel(model), model, x), expected)


@pytest.mark.parametrize("per_block", [True, False])
def test_fsdp_carries_the_streams_from_block_to_block(per_block: bool) -> None:
    x = example()
    model = converted(Net(3), x)
    expected = run(compiled(model, "aot_eager"), model, x)
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if per_block:
        compile_blocks_(sharded.blocks, "aot_eager")
    call = sharded if per_block else compiled(sharded, "aot_eager")
    with pytest.raises(UnsupportedGraphError, match="fully_shard"):
        mhc_compile.revert_(sharded)
    output, gradients = run(call, sharded, x)
    full = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    assert_same((output, full), expected)


class _Sent(torch.autograd.Function):
    """What DTensor's eager code gives: a result nobody has waited for, its gradient outside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return AsyncCollectiveTensor(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_what_comes_before_a_collective_that_is_on_its_way_is_trained() -> None:
    x = example()
    model = converted(Net(), x)
    expected = run(compiled(model, "aot_eager"), model, x)
    stem = model.get_submodule("stem")

    def send(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return _Sent.apply(output)

    compile_blocks_(model.get_submodule("blocks"), "aot_eager")
    with stem.register_forward_hook(send):
        found = run(model, model, x)
    assert_same(found, expected)


def _distribute_(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Make DTensors of all parameters but those of the sites."""
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            distribute_module(module, mesh)


def test_a_trunk_of_dtensors_computes_the_same_and_wants_parameters_of_its_kind() -> None:
    x, mesh = example(), init_device_mesh("cpu", (1,))
    model = converted(Net(), x)
    expected = compiled(model, "aot_eager")(x).detach()
    _distribute_(model, mesh)
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(UnsupportedGraphError, match=r"is a DTensor, .*replicate_parameters_"):
        compiled(model, "aot_eager")(sharded)
    replicate_parameters_(model, mesh)
    found = compiled(model, "aot_eager")(sharded)
    assert found.placements == (Shard(0),)
    assert torch.equal(found.full_tensor(), expected)


def test_a_trunk_of_plain_tensors_wants_plain_parameters() -> None:
    x = example()
    model = converted(Net(), x)
    replicate_parameters_(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedGraphError, match=r"is a plain tensor, .*are DTensors"):
        compiled(model, "aot_eager")(x)


def test_streams_are_not_carried_by_dtensors() -> None:
    x, mesh = example(), init_device_mesh("cpu", (1,))
    model = converted(Net(), x)
    _distribute_(model, mesh)
    replicate_parameters_(model, mesh)
    compile_blocks_(model.get_submodule("blocks"), "aot_eager")
    with pytest.raises(UnsupportedGraphError, match="as a DTensor, which cannot carry"):
        model(distribute_tensor(x, mesh, [Shard(0)]))
