"""`split_sites_pass` in a backward: which ops come in parts, and that numbers stay."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.collectives import waits_of_starts
from mhc_compile.passes.estimate import CPU, H100, Device
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.overlap import overlap_collectives_pass
from mhc_compile.passes.split import split_sites_pass
from mhc_compile.passes.stream_branches import side_kernels
from mhc_compile.passes.values import OPERAND_VALUES, value_of

OPS = torch.ops.mhc
EAGER_TO_SPLIT = replace(CPU, launch=0.0, op_launch=0.0, single_flops=1e9, link_latency=1.0)
"""Work takes its flops, and any collective longer."""
WHOLE = ["mhc.post_backward", "mhc.seam_backward", "mhc.pre_backward"]
PARTS = [
    *("mhc.post_backward_branch", "mhc.post_backward_state"),
    *("mhc.seam_backward_dz", "mhc.phi_backward"),
    "mhc.pre_backward",
]

pytestmark = pytest.mark.usefixtures("fake_ranks")


class Entered(torch.autograd.Function):
    """The input of a tensor parallel branch, whose gradient the ranks add."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return funcol.all_reduce(grad, "sum", dist.group.WORLD)


def leaves(spec: SiteSpec, tokens: int = 64, channels: int = 32) -> list[Tensor | None]:
    torch.manual_seed(0)
    parameters = {
        key: tensor + 0.3 * torch.randn_like(tensor)
        for key, tensor in initial_parameters(spec, channels).items()
    }
    shown = [parameters.get("phi"), parameters["bias"], parameters.get("alpha")]
    tensors = [torch.randn(tokens, spec.streams, channels), torch.randn(channels, channels), *shown]
    return [None if t is None else t.requires_grad_() for t in tensors]


def backward(
    spec: SiteSpec, *, reduce: bool = True, mode: str = "fake", tokens: int = 64
) -> GraphModule:
    """Gradients of two sites, the post-mix of the first joined with the second's pre-mix."""
    text = spec.encode()

    def branch(u: Tensor, w: Tensor) -> Tensor:
        return ((Entered.apply(u) if reduce else u) @ w).tanh()

    def function(X: Tensor, w: Tensor, *site: Tensor | None) -> Sequence[Tensor]:
        u, h_post, h_res, _ = OPS.pre(X, *site, text)
        Y, u2, h_post2, h_res2, _ = OPS.seam(X, branch(u, w), h_post, h_res, *site, text)
        out = OPS.post(Y, branch(u2, w), h_post2, h_res2, text)
        wanted = [t for t in (X, w, *site) if t is not None]
        return torch.autograd.grad(out.square().sum(), wanted)

    gm = make_fx(function, tracing_mode=mode)(*leaves(spec, tokens))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def split(gm: GraphModule, device: Device | None = EAGER_TO_SPLIT) -> bool:
    modified = split_sites_pass(gm, (), device=device).modified
    gm.graph.lint()
    gm.recompile()
    return modified


def ops(gm: GraphModule) -> list[str]:
    names = [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    return [name for name in names if "_backward" in name and name.startswith("mhc.")]


def test_what_a_branch_does_not_wait_for_runs_behind_its_collective() -> None:
    gm = backward(SiteSpec(streams=4))
    assert ops(gm) == WHOLE
    assert split(gm)
    assert ops(gm) == PARTS
    overlap_collectives_pass(gm, (), growth=1.0)
    nodes = list(gm.graph.nodes)
    windows = [
        {op_name(node) for node in nodes[nodes.index(start) : nodes.index(wait)]}
        for start, (wait,) in waits_of_starts(gm.graph).items()
    ]
    assert ["mhc.post_backward_state" in window for window in windows] == [True, False]
    assert ["mhc.phi_backward" in window for window in windows] == [False, True]


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
@pytest.mark.parametrize("constraint", ["sinkhorn", "none"])
def test_numbers_keep_their_bits(constraint: str, kernels: str) -> None:
    spec = SiteSpec(streams=2, constraint=constraint, kernels=kernels)
    gm, args = backward(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm)
    assert ops(gm) == PARTS
    assert all(map(torch.equal, gm(*args), expected))


def test_a_static_site_has_no_phi_and_its_post_comes_in_parts() -> None:
    spec = SiteSpec(streams=2, dynamic=False, kernels="reference")
    gm, args = backward(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm)
    assert ops(gm) == [*PARTS[:2], *WHOLE[1:]]
    assert all(map(torch.equal, gm(*args), expected))


def test_a_branch_without_a_collective_leaves_all_whole() -> None:
    gm = backward(SiteSpec(streams=2), reduce=False)
    code = gm.code
    assert not split(gm)
    assert gm.code == code


def test_what_leads_to_no_collective_stays_whole() -> None:
    spec = SiteSpec(streams=2)

    def function(X: Tensor, w: Tensor, *site: Tensor) -> Any:
        u, h_post, h_res, saved = OPS.pre(X, *site, spec.encode())
        beside = funcol.all_reduce(w.sin(), "sum", dist.group.WORLD)
        grads = OPS.pre_backward(u, h_post, h_res, X, *site, saved, spec.encode())
        behind = funcol.all_reduce(grads[1], "sum", dist.group.WORLD)  # of dphi itself
        return grads[0], beside, behind

    gm = make_fx(function, tracing_mode="fake")(*leaves(spec))
    assert not split(gm)


def test_the_estimate_decides() -> None:
    def decision(device: Device | None, tokens: int = 2048) -> list[str]:
        gm = backward(SiteSpec(streams=4), tokens=tokens)
        split(gm, device)
        return ops(gm)

    assert decision(None) == PARTS  # the graph's own device, and an ordinary link
    nothing_to_hide = replace(CPU, link_latency=0.0, link_bandwidth=1e15)
    assert decision(nothing_to_hide) == WHOLE
    assert decision(CPU, tokens=8) == WHOLE  # not worth a launch
    # Bound by bytes, but the gradient of phi is a kernel of its own in the whole op too.
    assert decision(replace(H100, launch=0.0, op_launch=0.0)) == PARTS
    assert decision(replace(H100, phi_apart=False, bandwidth=1e9, link_latency=1.0)) == [
        *PARTS[:2],
        *WHOLE[1:],
    ]


def test_gradients_of_weights_fill_a_window_first() -> None:
    gm = backward(SiteSpec(streams=4))
    weights = replace(EAGER_TO_SPLIT, single_flops=1e6)
    product = 2 * 64 * 32 * 32 / weights.single_flops
    assert not split(gm, replace(weights, link_latency=0.9 * product, link_bandwidth=1e15))
    assert split(gm, replace(weights, link_latency=1.5 * product, link_bandwidth=1e15))


def test_a_second_run_changes_nothing() -> None:
    gm = backward(SiteSpec(streams=2))
    assert split(gm)
    code = gm.code
    assert not split(gm)
    assert gm.code == code


def test_parts_say_where_they_come_from_and_what_they_compute() -> None:
    gm = backward(SiteSpec(streams=2))
    for node in gm.graph.nodes:
        if op_name(node) in WHOLE:
            node.meta["custom"] = {"mhc": node.name}
            node.meta[OPERAND_VALUES] = (map_arg(node.args, value_of), {})
    assert split(gm)
    made = [n for n in gm.graph.nodes if op_name(n) in PARTS[:-1]]
    assert len(made) == 4
    for node in made:
        assert node.meta["custom"]["mhc"] in node.name
        assert node.meta[OPERAND_VALUES] == (map_arg(node.args, value_of), {})
    values = {op_name(node): value_of(node) for node in made}
    assert values["mhc.phi_backward"].shape == (64, 8)
    assert values["mhc.post_backward_branch"].shape == (64, 32)
    dz = values["mhc.seam_backward_dz"][4]
    assert (dz.shape, dz.dtype) == ((64, 12), torch.float32)


def test_dynamic_sizes_stay_dynamic() -> None:
    spec = SiteSpec(streams=2, kernels="reference")
    gm = backward(spec, mode="symbolic")
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(shape_env.guards)
    expected = gm(*leaves(spec, tokens=10))
    assert split(gm)
    assert ops(gm) == PARTS
    assert len(shape_env.guards) == guards
    assert all(map(torch.equal, gm(*leaves(spec, tokens=10)), expected))


def test_parts_run_on_the_stream_that_the_whole_did() -> None:
    gm = backward(SiteSpec(streams=2))
    assert {op_name(node) for node in side_kernels(gm.graph)} >= set(WHOLE[:2])
    assert split(gm)
    found = {op_name(node) for node in side_kernels(gm.graph)}
    assert found >= set(PARTS[:3])
    assert "mhc.phi_backward" not in found  # nothing on the side stream waits for it
