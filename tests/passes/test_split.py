"""`split_sites_pass`: which sites are split, and that nothing else changes."""

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
from mhc_compile.passes.estimate import CPU, H100
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.overlap import overlap_collectives_pass
from mhc_compile.passes.split import split_sites_pass
from mhc_compile.passes.values import OPERAND_VALUES, value_of

OPS = torch.ops.mhc
FREE = replace(CPU, launch=0.0, op_launch=0.0, single_flops=1e9, link_latency=1.0)
"""Work takes its flops, and any collective longer."""
EAGER_TO_SPLIT = replace(FREE, bandwidth=1e9, op_launch=15e-6)
"""The same, but a post takes its bytes, give or take a launch."""


pytestmark = pytest.mark.usefixtures("fake_ranks")


def leaves(spec: SiteSpec, tokens: int = 64, channels: int = 32) -> tuple[Any, ...]:
    torch.manual_seed(0)
    state = torch.randn(tokens, spec.streams, channels)
    parameters = {
        key: tensor + 0.3 * torch.randn_like(tensor)
        for key, tensor in initial_parameters(spec, channels).items()
    }
    shown = (parameters.get("phi"), parameters["bias"], parameters.get("alpha"))
    return state, torch.randn(channels, channels), *shown


def lowered(
    spec: SiteSpec, *, reduce: bool = True, mode: str = "fake", tokens: int = 64
) -> GraphModule:
    """Two sites, the post-mix of the first joined with the second's pre-mix."""
    text = spec.encode()

    def branch(u: Tensor, w: Tensor) -> Tensor:
        y = (u @ w).tanh()
        return funcol.all_reduce(y, "sum", dist.group.WORLD) if reduce else y

    def function(X: Tensor, w: Tensor, *site: Tensor | None) -> Any:
        u, h_post, h_res, saved = OPS.pre(X, *site, text)
        X, u2, h_post2, h_res2, saved2 = OPS.seam(X, branch(u, w), h_post, h_res, *site, text)
        X = OPS.post(X, branch(u2, w), h_post2, h_res2, text)
        return X, u, saved, saved2

    return make_fx(function, tracing_mode=mode)(*leaves(spec, tokens))


def split(gm: GraphModule, device: Any = EAGER_TO_SPLIT) -> bool:
    modified = split_sites_pass(gm, (), device=device).modified
    gm.graph.lint()
    gm.recompile()
    return modified


def sites(gm: GraphModule) -> list[str]:
    names = [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("mhc.")]


WHOLE = ["mhc.pre", "mhc.seam", "mhc.post"]
HALVES = ["mhc.collapse", "mhc.pre", "mhc.post", "mhc.collapse", "mhc.pre", "mhc.post"]


def test_the_mappings_of_a_site_run_behind_the_collective_of_its_branch() -> None:
    gm = lowered(SiteSpec(streams=4))
    assert sites(gm) == WHOLE
    assert split(gm)
    assert sites(gm) == HALVES
    overlap_collectives_pass(gm, (), growth=1.0)
    nodes = list(gm.graph.nodes)
    for start, (wait,) in waits_of_starts(gm.graph).items():
        window = nodes[nodes.index(start) : nodes.index(wait)]
        assert "mhc.pre" in map(op_name, window)


@pytest.mark.parametrize("streams", [2, 4])
def test_generated_kernels_give_the_same_bits(streams: int) -> None:
    spec = SiteSpec(streams=streams, kernels="cpp")
    gm, args = lowered(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm)
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize("constraint", ["sinkhorn", "sinkhorn_softmax", "identity", "permutations"])
def test_every_constraint_with_gates_of_the_paper_gives_the_same_numbers(constraint: str) -> None:
    spec = SiteSpec(streams=2, constraint=constraint, pre_eps=1e-3, kernels="reference")
    gm, args = lowered(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm)
    for found, wanted in zip(gm(*args), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        SiteSpec(streams=2, constraint="none"),  # norms and gates of its own
        SiteSpec(streams=2, dynamic=False),  # nothing to compute
    ],
)
def test_a_site_without_such_halves_stays_whole(spec: SiteSpec) -> None:
    gm = lowered(spec)
    code = gm.code
    assert not split(gm)
    assert gm.code == code


def test_a_branch_without_a_collective_stays_whole() -> None:
    gm = lowered(SiteSpec(streams=2), reduce=False)
    assert not split(gm)


def test_a_collective_that_is_not_on_the_way_of_the_branch_splits_nothing() -> None:
    spec = SiteSpec(streams=2)

    def function(X: Tensor, w: Tensor, *site: Tensor | None) -> Any:
        u, h_post, h_res, _ = OPS.pre(X, *site, spec.encode())
        beside = funcol.all_reduce(w.sin(), "sum", dist.group.WORLD)
        behind = funcol.all_reduce(u.sin(), "sum", dist.group.WORLD)
        return OPS.post(X, u @ beside, h_post, h_res, spec.encode()), behind

    gm = make_fx(function, tracing_mode="fake")(*leaves(spec))
    assert not split(gm)
    assert sites(gm) == ["mhc.pre", "mhc.post"]


def test_a_single_pass_stays_whole() -> None:
    gm = lowered(SiteSpec(streams=2, single_pass=True))
    assert sites(gm) == WHOLE
    assert not split(gm)


def test_the_estimate_decides() -> None:
    def decision(device: Any, tokens: int = 2048) -> bool:
        return split(lowered(SiteSpec(streams=4), tokens=tokens), device)

    assert decision(None)  # the graph's own device, and an ordinary link
    assert not decision(replace(CPU, link_latency=0.0, link_bandwidth=1e15))  # nothing to hide
    assert not decision(H100)  # bound by bytes: to read X twice costs more
    assert not decision(CPU, tokens=8)  # more launches cost more


def test_a_second_run_changes_nothing() -> None:
    gm = lowered(SiteSpec(streams=2))
    assert split(gm)
    code = gm.code
    assert not split(gm)
    assert gm.code == code


def test_halves_say_where_they_come_from_and_what_they_compute() -> None:
    gm = lowered(SiteSpec(streams=2))
    for node in gm.graph.nodes:
        if op_name(node) in WHOLE:
            node.meta["custom"] = {"mhc": node.name}
            node.meta[OPERAND_VALUES] = (map_arg(node.args, value_of), {})
    assert split(gm)
    made = {n.name: n for n in gm.graph.nodes if "_premix" in n.name or "_mappings" in n.name}
    assert sorted(made) == ["pre_mappings", "pre_premix", "seam_mappings", "seam_premix"]
    for name, node in made.items():
        assert node.meta["custom"] == {"mhc": name.partition("_")[0]}
        assert node.meta[OPERAND_VALUES] == (map_arg(node.args, value_of), {})
    assert made["seam_premix"].meta["val"].shape == (64, 32)


def test_dynamic_sizes_stay_dynamic() -> None:
    spec = SiteSpec(streams=2, kernels="reference")
    gm = lowered(spec, mode="symbolic")
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(shape_env.guards)
    expected = gm(*leaves(spec, tokens=10))
    assert split(gm)
    assert len(shape_env.guards) == guards
    for found, wanted in zip(gm(*leaves(spec, tokens=10)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
