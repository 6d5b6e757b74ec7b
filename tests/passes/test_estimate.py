"""`mhc_compile.passes.estimate`: bytes, flops and seconds of nodes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.traffic import least_rows
from mhc_compile.passes.estimate import (
    CPU,
    H100,
    Device,
    device_of,
    estimate,
    is_free,
    node_bytes,
    node_flops,
    node_seconds,
    transfer_seconds,
)

OPS = torch.ops.mhc
ATEN = torch.ops.aten


def lowered(function: Callable[..., Any], *args: Any, mode: str = "fake") -> GraphModule:
    return make_fx(function, tracing_mode=mode)(*args)


def only(gm: GraphModule, target: Any) -> Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=target)
    return node


def site(n: int, channels: int, tokens: int) -> tuple[Any, ...]:
    width = 2 * n + n * n
    state = torch.randn(1, tokens, n, channels)
    return state, torch.randn(n * channels, width), torch.randn(width), torch.ones(3)


def test_flops_of_products_convolutions_and_attention_are_those_that_torch_counts() -> None:
    def function(x: Tensor, weight: Tensor, image: Tensor, kernel: Tensor, q: Tensor) -> Any:
        product = F.linear(x, weight).sum()
        batched = (q @ q.mT).sum()
        return product + batched + F.conv2d(image, kernel).sum()

    args = (
        torch.randn(6, 8),
        torch.randn(5, 8),
        torch.randn(2, 3, 9, 9),
        torch.randn(4, 3, 3, 3),
        torch.randn(2, 4, 3),
    )
    with FlopCounterMode(display=False) as counter:
        function(*args)
    graph = lowered(function, *args).graph
    assert sum(map(node_flops, graph.nodes)) == counter.get_total_flops() > 0


def test_attention_counts_on_a_cpu_too() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def step(q: Tensor) -> Tensor:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q)[0]

    gm = lowered(step, q)
    forward = only(gm, ATEN._scaled_dot_product_flash_attention_for_cpu.default)
    backward = only(gm, ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default)
    one = 2 * 2 * 16 * 16 * 8
    assert (node_flops(forward), node_flops(backward)) == (2 * one, 5 * one)


def test_every_operand_and_result_is_moved_once_and_views_are_free() -> None:
    gm = lowered(lambda x, y: (x + y).view(-1).t() * 1, torch.randn(3, 4), torch.randn(4))
    assert node_bytes(only(gm, ATEN.add.Tensor)) == 4 * (12 + 4 + 12)
    views = [node for node in gm.graph.nodes if node.op == "call_function" and is_free(node)]
    assert {node.target for node in views} == {ATEN.view.default, ATEN.t.default}
    assert all(node_seconds(node, CPU) == 0 for node in views)


@pytest.mark.parametrize("n", [1, 4])
def test_an_mhc_op_moves_its_least_rows_and_little_beside(n: int) -> None:
    channels, tokens = 512, 64
    state, phi, bias, alpha = site(n, channels, tokens)
    text = SiteSpec(streams=n).encode()
    leaves = [tensor.requires_grad_() for tensor in (state, phi, bias, alpha)]

    def step(state: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Any:
        u, h_post, h_res, _ = OPS.pre(state, phi, bias, alpha, text)
        seam = OPS.seam(state, u, h_post, h_res, phi, bias, alpha, text)
        out = OPS.post(seam[0], seam[1], seam[2], seam[3], text)
        return torch.autograd.grad(out.sum(), leaves[:1])

    gm = make_fx(step)(*leaves)
    rows = least_rows(n)
    for name in ("pre", "pre_backward", "post", "post_backward", "seam", "seam_backward"):
        node = only(gm, getattr(OPS, name).default)
        streamed = 4 * channels * tokens * rows[name]
        parameters = 2 * 4 * phi.numel() * ("post" not in name)
        mappings = 6 * 4 * tokens * (2 * n * n + 4 * n + 1)
        assert streamed <= node_bytes(node) <= streamed + parameters + mappings + 1000


def test_flops_of_an_mhc_op_are_those_of_its_projection_and_its_mixing() -> None:
    n, channels, tokens = 4, 32, 10
    text = SiteSpec(streams=n, kernels="reference").encode()
    leaves = site(n, channels, tokens)
    pre = only(make_fx(lambda *args: OPS.pre(*args, text))(*leaves), OPS.pre.default)
    u, h_post, h_res, _ = OPS.pre(*leaves, text)
    post = make_fx(lambda *args: OPS.post(*args, text))(leaves[0], u, h_post, h_res)
    projection = 2 * tokens * n * channels * (n * n + 2 * n)
    assert node_flops(pre) == projection + 2 * tokens * n * channels
    assert node_flops(only(post, OPS.post.default)) == 2 * tokens * channels * (n * n + n)


def test_a_learned_collapse_projects_n_columns_and_its_backward_makes_them_again() -> None:
    n, channels, tokens = 4, 32, 10
    state, phi, bias, alpha = (tensor.requires_grad_() for tensor in site(n, channels, tokens))
    text = SiteSpec(streams=n, kernels="reference").encode()

    def step(X: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Any:
        x = OPS.collapse(X, phi, bias, alpha, "learned", text)
        return torch.autograd.grad(x.sum(), X), OPS.collapse(X, None, None, None, "mean", text)

    head = phi[:, :n].clone(), bias[:n].clone(), alpha[:1].clone()
    gm = make_fx(step)(state, *head)
    learned, mean = gm.graph.find_nodes(op="call_function", target=OPS.collapse.default)
    once = 2 * tokens * n * channels * (n + 1)
    assert (node_flops(learned), node_flops(mean)) == (once, 0)
    assert node_flops(only(gm, OPS.collapse_backward.default)) == 3 * once


def flops(op: Any, *args: Any) -> int:
    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return op(*(next(given) if isinstance(arg, Tensor) else arg for arg in args))

    return node_flops(only(make_fx(run)(*(arg for arg in args if isinstance(arg, Tensor))), op))


def test_the_parts_of_an_op_count_what_the_whole_does() -> None:
    spec, (X, phi, bias, alpha) = SiteSpec(streams=2, kernels="reference"), site(2, 8, 5)
    text, f = spec.encode(), torch.randn(1, 5, 8)
    u, *mappings, saved = OPS.pre(X, phi, bias, alpha, text)
    of_pre = (u, *mappings, X, phi, bias, alpha, saved, text)
    of_seam = (X, u, *mappings, X, f, *mappings, phi, bias, alpha, saved, text)
    dz = OPS.pre_backward_dz(*of_pre)[1]
    none = (None, None, None)
    projection = flops(OPS.phi_backward.default, dz, X, *none, phi, text)
    again = flops(OPS.phi_backward.default, dz, X, f, *mappings, phi, text) - projection
    assert projection == 2 * 5 * phi.numel()
    assert again == flops(OPS.post.default, X, f, *mappings, text)
    for whole, part, args in (
        (OPS.pre_backward, OPS.pre_backward_dz, of_pre),
        (OPS.seam_backward, OPS.seam_backward_dz, of_seam),
    ):
        assert flops(whole.default, *args) - flops(part.default, *args) == projection
    mixing = flops(OPS.mix.default, X, mappings[1], text)
    still = SiteSpec(streams=2, constraint="identity", kernels="reference").encode()
    rest = flops(OPS.post.default, X, f, mappings[0], torch.eye(2), still)
    assert mixing + rest == flops(OPS.post.default, X, f, *mappings, text)
    branch = flops(OPS.post_backward_branch.default, X, mappings[0], torch.float32, text)
    state = flops(OPS.post_backward_state.default, X, X, f, *mappings, text)
    assert branch + state == flops(OPS.post_backward.default, X, X, f, *mappings, text)


def test_a_backward_that_adds_another_gradient_counts_like_one_that_does_not() -> None:
    spec, (state, phi, bias, alpha) = SiteSpec(streams=2, kernels="reference"), site(2, 8, 5)
    u, *mappings, saved = OPS.pre(state, phi, bias, alpha, spec.encode())

    def step(*more: Tensor) -> Any:
        args = (u, *mappings, state, phi, bias, alpha, saved, spec.encode())
        return OPS.pre_backward(*args, *more)

    plain, adds = (make_fx(step)(*more) for more in ((), (state,)))
    one, other = (only(gm, OPS.pre_backward.default) for gm in (plain, adds))
    assert node_flops(one) == node_flops(other) > 0


def test_an_mhc_op_has_a_launch_of_its_own() -> None:
    gm = make_fx(lambda x: OPS.expand(x + 1, 2, -1))(torch.ones(1))
    device = replace(CPU, launch=1.0, op_launch=2.0)
    assert int(node_seconds(only(gm, OPS.expand.default), device)) == 2
    assert int(node_seconds(only(gm, ATEN.add.Tensor), device)) == 1


def test_a_static_site_projects_nothing() -> None:
    text = SiteSpec(streams=2, dynamic=False).encode()
    gm = make_fx(lambda X, b: OPS.pre(X, None, b, None, text))(torch.ones(3, 2, 5), torch.ones(8))
    assert node_flops(only(gm, OPS.pre.default)) == 2 * 3 * 2 * 5


def test_symbolic_sizes_count_with_their_hints_and_get_no_guard() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight + 1

    args = (torch.randn(6, 8), torch.randn(8, 5))
    gm = lowered(function, *args, mode="symbolic")
    plain = lowered(function, *args)
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = list(shape_env.guards)
    expected = list(estimate(plain.graph, CPU).values())
    found = [t for n, t in estimate(gm.graph, CPU).items() if "sym_size" not in n.name]
    assert found == expected
    assert shape_env.guards == guards


def test_a_product_takes_its_flops_and_a_sum_its_bytes() -> None:
    gm = lowered(lambda x: (x @ x) + x, torch.randn(512, 512))
    device = replace(CPU, launch=1.0, single_flops=2.0 * 512**3 / 10, bandwidth=12 * 512**2 / 5)
    assert node_seconds(only(gm, ATEN.mm.default), device) == 11.0
    assert node_seconds(only(gm, ATEN.add.Tensor), device) == 6.0
    half = lowered(lambda x: x @ x, torch.randn(512, 512, dtype=torch.bfloat16))
    faster = replace(device, half_flops=2 * device.single_flops)
    assert node_seconds(only(half, ATEN.mm.default), faster) == 6.0


def test_attention_in_half_is_as_fast_as_half_though_its_statistics_are_float32() -> None:
    def seconds(dtype: torch.dtype, device: Device) -> float:
        gm = lowered(F.scaled_dot_product_attention, *torch.randn(3, 1, 2, 64, 32, dtype=dtype))
        return node_seconds(
            only(gm, ATEN._scaled_dot_product_flash_attention_for_cpu.default), device
        )

    device = replace(CPU, launch=0.0, bandwidth=1e30, half_flops=2 * CPU.single_flops)
    assert seconds(torch.bfloat16, device) == seconds(torch.float32, device) / 2


@pytest.mark.usefixtures("fake_ranks")
def test_a_collective_takes_the_link_and_not_the_device() -> None:
    def function(x: Tensor) -> Tensor:
        gathered = funcol.all_gather_single(x, 0, dist.group.WORLD)
        return funcol.all_reduce(gathered + 1, "sum", dist.group.WORLD) + 1

    gm = lowered(function, torch.randn(25, 10))
    gather = only(gm, torch.ops._c10d_functional.all_gather_into_tensor.default)
    reduce = only(gm, torch.ops._c10d_functional.all_reduce.default)
    device = replace(CPU, launch=3.0, link_latency=1.0, link_bandwidth=1000.0)
    assert transfer_seconds(gather, device) == 1.0 + 2.0
    assert transfer_seconds(reduce, device) == 1.0 + 2 * 2.0
    waits = gm.graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.wait_tensor.default
    )
    assert [node_seconds(node, device) for node in (gather, reduce, *waits)] == [3, 3, 0, 0]


def test_the_table_is_looked_up_by_the_device_of_the_graph() -> None:
    assert device_of(lowered(torch.neg, torch.ones(1)).graph) is CPU
    gm = make_fx(lambda x: x + 1)(torch.ones(1, device="meta"))
    assert device_of(gm.graph) is H100
