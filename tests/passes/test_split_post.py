"""`split_sites_pass` of a post: when H_res X comes first, and that nothing else changes."""

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

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.collectives import waits_of_starts
from mhc_compile.passes.estimate import CPU, H100
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.overlap import overlap_collectives_pass
from mhc_compile.passes.stream_branches import side_kernels
from mhc_compile.passes.values import OPERAND_VALUES, value_of
from tests.passes.test_split import FREE, leaves, lowered, sites, split

OPS = torch.ops.mhc
PARTS = ["mhc.mix", "mhc.post"]
STATIC = SiteSpec(streams=3, dynamic=False, kernels="reference")

pytestmark = pytest.mark.usefixtures("fake_ranks")


def one_site(spec: SiteSpec, *, behind: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A site whose mappings are given, and its tensors; the branch may end in an all-reduce."""
    text, generator = spec.encode(), torch.Generator().manual_seed(0)
    n, per_token = spec.streams, [64] if spec.dynamic else []

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    tensors = random(64, n, 32).to(dtype), random(*per_token, n), random(*per_token, n, n)

    def function(X: Tensor, h_post: Tensor, h_res: Tensor) -> Any:
        f = X.sum(1).tanh()
        reduced = funcol.all_reduce(f, "sum", dist.group.WORLD)
        return OPS.post(X, reduced if behind else f, h_post, h_res, text), reduced

    return make_fx(function, tracing_mode="fake")(*tensors), tensors


def windows(gm: GraphModule) -> list[set[str]]:
    """What runs between the start and the wait of every collective."""
    nodes = list(gm.graph.nodes)
    return [
        {op_name(node) for node in nodes[nodes.index(start) : nodes.index(wait)]}
        for start, (wait,) in waits_of_starts(gm.graph).items()
    ]


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("kernels", ["cpp", "reference"])
def test_the_streams_are_mixed_behind_the_start_of_the_collective(
    streams: int, kernels: str
) -> None:
    gm, args = one_site(SiteSpec(streams=streams, kernels=kernels))
    expected = gm(*args)
    assert sites(gm) == ["mhc.post"]
    assert split(gm, FREE)
    assert sites(gm) == PARTS
    overlap_collectives_pass(gm, (), growth=10.0)
    gm.recompile()
    assert ["mhc.mix" in window for window in windows(gm)] == [True]
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize("constraint", ["sinkhorn", "none", "kronecker", "permutations"])
def test_every_constraint_that_mixes_keeps_its_bits(constraint: str) -> None:
    gm, args = one_site(SiteSpec(streams=2, constraint=constraint, kernels="reference"))
    expected = gm(*args)
    assert split(gm, FREE)
    assert sites(gm) == PARTS
    assert all(map(torch.equal, gm(*args), expected))


def test_halves_of_a_site_and_of_its_post_are_split_together() -> None:
    spec = SiteSpec(streams=4, kernels="cpp")
    gm, args = lowered(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm, FREE)
    assert sites(gm) == ["mhc.collapse", "mhc.pre", *PARTS, "mhc.collapse", "mhc.pre", *PARTS]
    overlap_collectives_pass(gm, (), growth=10.0)
    gm.recompile()
    assert all(window >= {"mhc.pre", "mhc.mix"} for window in windows(gm))
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize("spec", [STATIC, SiteSpec(streams=2, single_pass=True, kernels="cpp")])
def test_a_seam_stays_whole_and_the_post_behind_it_does_not(spec: SiteSpec) -> None:
    gm, args = lowered(spec), leaves(spec)
    expected = gm(*args)
    assert split(gm, FREE)
    assert sites(gm) == ["mhc.pre", "mhc.seam", *PARTS]
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_that_would_be_rounded_once_more_stay_whole(dtype: torch.dtype) -> None:
    gm, _ = one_site(STATIC, dtype=dtype)
    assert not split(gm, FREE)


def test_streams_of_float64_are_not_rounded() -> None:
    gm, args = one_site(STATIC, dtype=torch.float64)
    expected = gm(*args)
    assert split(gm, FREE)
    assert all(map(torch.equal, gm(*args), expected))


@pytest.mark.parametrize(
    "spec", [replace(STATIC, constraint="identity"), replace(STATIC, streams=1)]
)
def test_where_there_is_nothing_to_take_off_a_post_stays_whole(spec: SiteSpec) -> None:
    gm, _ = one_site(spec)
    code = gm.code
    assert not split(gm, FREE)
    assert gm.code == code


def test_a_branch_output_that_is_not_behind_the_collective_splits_nothing() -> None:
    gm, _ = one_site(STATIC, behind=False)
    assert waits_of_starts(gm.graph)
    assert not split(gm, FREE)


def test_a_collective_that_the_state_does_not_lead_to_splits_nothing() -> None:
    def function(X: Tensor, h_post: Tensor, h_res: Tensor, w: Tensor) -> Tensor:
        gathered = funcol.all_reduce(w.sin(), "sum", dist.group.WORLD)  # can start before all else
        return OPS.post(X, X.sum(1) @ gathered, h_post, h_res, STATIC.encode())

    _, tensors = one_site(STATIC)
    gm = make_fx(function, tracing_mode="fake")(*tensors, torch.ones(32, 32))
    assert not split(gm, FREE)


def test_a_mixing_that_waits_for_the_same_collective_stays_in_the_post() -> None:
    def function(X: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        f = funcol.all_reduce(X.sum(1), "sum", dist.group.WORLD)
        return OPS.post(X, f, h_post, h_res * f.mean(), STATIC.encode())

    _, tensors = one_site(STATIC)
    assert not split(make_fx(function, tracing_mode="fake")(*tensors), FREE)


def test_the_estimate_decides() -> None:
    def decision(device: Any, streams: int = 16, tokens: int = 4096) -> bool:
        spec = SiteSpec(streams=streams, dynamic=False)
        gm = lowered(spec, tokens=tokens)
        split(gm, device)
        return "mhc.mix" in sites(gm)

    assert decision(None)  # the graph's own device, and an ordinary link
    assert not decision(None, streams=4)  # the bytes that stay behind the wait take as long
    assert not decision(replace(FREE, bandwidth=1e8))  # likewise
    assert not decision(H100)
    assert not decision(None, tokens=64)  # not worth a launch
    assert not decision(replace(CPU, link_latency=0.0, link_bandwidth=1e15))  # nothing to hide


def test_mappings_fill_a_window_first() -> None:
    gm = lowered(SiteSpec(streams=4))
    mappings = (64 * 4 * 32 * 2 * 24 + 64 * 4 * 32 * 2) / FREE.single_flops
    too_short = replace(FREE, link_latency=0.9 * mappings, link_bandwidth=1e15)
    assert split(gm, too_short)
    assert "mhc.mix" not in sites(gm)
    assert split(gm, replace(too_short, link_latency=2.0 * mappings))
    assert sites(gm).count("mhc.mix") == 2


def test_a_second_run_changes_nothing() -> None:
    gm, _ = one_site(STATIC)
    assert split(gm, FREE)
    code = gm.code
    assert not split(gm, FREE)
    assert gm.code == code


def test_parts_say_where_they_come_from_and_what_they_compute() -> None:
    gm, _ = one_site(STATIC)
    (post,) = gm.graph.find_nodes(op="call_function", target=OPS.post.default)
    post.meta["custom"] = {"mhc": "here"}
    post.meta[OPERAND_VALUES] = (map_arg(post.args, value_of), {})
    assert split(gm, FREE)
    made = [node for node in gm.graph.nodes if op_name(node) in PARTS]
    for node in made:
        assert node.meta["custom"] == {"mhc": "here"}
        assert node.meta[OPERAND_VALUES] == (map_arg(node.args, value_of), {})
        assert value_of(node).shape == (64, 3, 32)


def test_dynamic_sizes_stay_dynamic() -> None:
    gm = lowered(STATIC, mode="symbolic")
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(shape_env.guards)
    expected = gm(*leaves(STATIC, tokens=10))
    assert split(gm, FREE)
    assert sites(gm)[-2:] == PARTS
    assert len(shape_env.guards) == guards
    assert all(map(torch.equal, gm(*leaves(STATIC, tokens=10)), expected))


def test_the_mixing_runs_on_the_stream_that_the_whole_post_did() -> None:
    gm = lowered(SiteSpec(streams=4, dynamic=False))
    assert "mhc.post" in map(op_name, side_kernels(gm.graph))
    assert split(gm, FREE)
    assert {op_name(node) for node in side_kernels(gm.graph)} >= set(PARTS)
