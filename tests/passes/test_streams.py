"""`assign_streams_pass`: which kernels go to the side stream, in which order, with which syncs."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import GraphModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhc_compile import MHCConfig
from mhc_compile.errors import VerificationError
from mhc_compile.inspection import lowered_graphs
from mhc_compile.passes.estimate import H100
from mhc_compile.passes.happens_before import find_races
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.schedule import dependences
from mhc_compile.passes.simulate import LINK
from mhc_compile.passes.stream_branches import side_kernels
from mhc_compile.passes.stream_graph import launches, steps_of, storages
from mhc_compile.passes.stream_order import deferred_order
from mhc_compile.passes.stream_program import Launch, Wait, synchronize
from mhc_compile.passes.streams import PLAN, STREAM, StreamPlan, assign_streams_pass, plan_streams
from tests.models.zoo import build
from tests.passes.stream_oracle import assert_sound, mutants, sanitizer_errors
from tests.tensor_parallel import parallel_stack

WIDTH, HEADS = 8, 2
SHAPE = (2, 6, WIDTH)
SLOW = replace(H100, launch=1e-6, bandwidth=1e6, single_flops=1e7, half_flops=1e7)
"""A device on which the small tensors of a test take far longer than their launches."""


class Attention(nn.Module):
    """Causal attention by the fused operation, or spelt out."""

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.core = core or F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = self.qkv(self.norm(x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.core(*parts.unbind()).transpose(1, 2).reshape(batch, time, WIDTH))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.elu(q) @ (k.transpose(-1, -2) @ v)


class MLP(nn.Module):
    """Two products around a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Gated(MLP):
    """SwiGLU: products of data with data, but element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """All experts at once, weighted by a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(3, WIDTH, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights = self.router(tokens).softmax(-1).t()[:, :, None]
        hidden = F.gelu(tokens.expand(3, -1, -1) @ self.up) @ self.down
        return (hidden * weights).sum(0).view_as(x)


class Convolved(nn.Module):
    """Two convolutions over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x.transpose(1, 2)))).transpose(1, 2)


class Crossed(nn.Module):
    """Attention, spelt out, to values that are computed beside the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.register_buffer("memory", torch.randn(2, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.memory).chunk(2, -1)
        return softmax_attention(self.q(x), k, v)


class Net(nn.Module):
    """A trunk of the given branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def transformer(depth: int = 2) -> Net:
    return Net(*(branch for _ in range(depth) for branch in (Attention(), MLP())))


def lowered(model: nn.Module, *args: Any, **config: Any) -> dict[str, GraphModule]:
    """The forward and the backward graph of a converted model."""
    torch.manual_seed(0)
    inputs = args or (torch.randn(SHAPE),)
    settings = MHCConfig(kernels="reference", **config)
    _, graphs = lowered_graphs(model, *inputs, config=settings)
    return {graph.phase: graph.gm for graph in graphs}


def side(gm: GraphModule) -> list[str]:
    chosen = side_kernels(gm.graph)
    return [op_name(node).removeprefix("mhc.") for node in gm.graph.nodes if node in chosen]


def values_of_inputs(gm: GraphModule) -> list[Any]:
    """Something for every placeholder, by its fake value."""
    torch.manual_seed(1)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    return [
        torch.randn(tuple(fake.shape)).to(fake.dtype) if isinstance(fake, Tensor) else fake
        for fake in fakes
    ]


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphModule]:
    """Of two layers, nothing recomputed; not to be changed."""
    return lowered(transformer(), recompute="off")


@pytest.mark.parametrize("branch", [MLP, Gated, Experts, Convolved])
def test_what_follows_an_mlp_goes_to_the_side_forward_and_backward(branch: Any) -> None:
    found = lowered(Net(branch(), branch()), recompute="off")
    assert side(found["fw"]) == ["seam", "post"]
    assert side(found["bw"]) == ["expand", "post_backward", "seam_backward"]


@pytest.mark.parametrize("core", [None, softmax_attention, linear_attention])
def test_what_follows_attention_stays_however_it_is_spelt(core: Any) -> None:
    found = lowered(Net(Attention(core), Attention(core)), recompute="off")
    assert side(found["fw"]) == side(found["bw"]) == []


def test_attention_to_values_beside_the_trunk_stays_in_the_forward() -> None:
    with torch.no_grad():
        found = lowered(Net(Crossed(), Crossed()))
    assert side(found["fw"]) == []


def test_only_the_mlps_of_a_transformer_count(graphs: dict[str, GraphModule]) -> None:
    assert side(graphs["fw"]) == ["seam", "post"]
    assert side(graphs["bw"]) == ["expand", "post_backward", "seam_backward"]


def test_a_pre_that_was_not_joined_goes_with_its_post_and_the_sum_of_gradients_too() -> None:
    skipped = ("join_seams_pass", "accumulate_gradients_pass")
    found = lowered(transformer(), recompute="off", skip_passes=skipped)
    assert side(found["fw"]) == ["post", "pre", "post"]
    backward = ["post_backward", "pre_backward", "add", "post_backward"]
    assert side(found["bw"]) == ["expand", *backward]


def test_what_a_backward_makes_again_goes_to_the_side_whatever_it_follows() -> None:
    found = lowered(transformer(), recompute=2)
    again = [name for name in side(found["bw"]) if not name.endswith("_backward")]
    assert again.count("replay") == 2
    found = lowered(transformer(), recompute=2, skip_passes=("keep_mappings_pass",))
    again = [name for name in side(found["bw"]) if not name.endswith("_backward")]
    assert again.count("seam") == 2
    assert again.count("pre") == 2
    kernels = [op_name(n) for n in found["bw"].graph.nodes if op_name(n) == "mhc.seam"]
    assert len(kernels) == 2


class Foreign(nn.Module):
    """A branch around an operator that is not torch's."""

    def __init__(self, operands: int) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(operands))

    def forward(self, x: Tensor) -> Tensor:
        return foreign([weight(x) for weight in self.weights])


@torch.library.custom_op("tests_streams::foreign", mutates_args=())
def foreign(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0)


@torch.library.custom_op("tests_streams::foreign_backward", mutates_args=())
def foreign_backward(grad: Tensor, values: list[Tensor]) -> list[Tensor]:
    return [grad.clone() for _ in values]


@foreign.register_fake
def _(values: list[Tensor]) -> Tensor:
    return torch.empty_like(values[0])


@foreign_backward.register_fake
def _(grad: Tensor, values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(grad) for _ in values]


foreign.register_autograd(
    lambda ctx, grad: foreign_backward(grad, list(ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
)


@pytest.mark.parametrize(("operands", "is_mlp"), [(1, True), (3, False)])
def test_a_foreign_operator_is_judged_by_what_it_reads(operands: int, is_mlp: bool) -> None:
    found = lowered(Net(Foreign(operands), Foreign(operands)), recompute="off")
    assert side(found["fw"]) == (["seam", "post"] if is_mlp else [])
    expected = ["expand", "post_backward", "seam_backward"]
    assert side(found["bw"]) == (expected if is_mlp else [])


def test_gradients_of_weights_go_behind_the_side_kernel_they_delay(
    graphs: dict[str, GraphModule],
) -> None:
    graph = graphs["bw"].graph
    chosen = side_kernels(graph)
    (seam,) = [node for node in chosen if op_name(node) == "mhc.seam_backward"]

    def products_before(nodes: Any) -> int:
        nodes = list(nodes)
        return sum(op_name(node) == "mm" for node in nodes[: nodes.index(seam)])

    order = deferred_order(graph, chosen)
    assert set(order) == set(graph.nodes)
    # Of MLP and attention: two gradients of data each, which the seam needs, two of weights.
    assert products_before(graph.nodes) == 8
    assert products_before(order) == 4
    position = {node: number for number, node in enumerate(order)}
    assert all(position[n] < position[node] for node in order for n in node.all_input_nodes)


def test_views_launch_nothing_and_lie_in_what_they_show(graphs: dict[str, GraphModule]) -> None:
    graph = graphs["fw"].graph
    lies_in = storages(graph.nodes)
    for node in graph.nodes:
        if op_name(node) in ("view", "t", "transpose", "permute", "select", "detach"):
            assert not launches(node)
            assert lies_in[node] == lies_in[node.args[0]]
    (seam, *_) = graph.find_nodes(op="call_function", target=torch.ops.mhc.seam.default)
    parts = {lies_in[user] for user in seam.users}
    assert (f"{seam.name}.0",) in parts
    assert len(parts) == len(seam.users)


def test_a_plan_waits_for_the_side_only_where_its_results_are_read(
    graphs: dict[str, GraphModule],
) -> None:
    plan = plan_streams(graphs["fw"].graph, SLOW)
    readers = {
        step.name
        for before, step in zip(plan.program, plan.program[1:], strict=False)
        if isinstance(before, Wait) and before.stream == 0 and isinstance(step, Launch)
    }
    assert len(readers) == 2
    assert "collapse" in readers


def test_a_plan_that_gains_nothing_leaves_the_graph_alone(graphs: dict[str, GraphModule]) -> None:
    gm = graphs["fw"]  # its fused ops leave nothing that could run beside them
    before = [node.name for node in gm.graph.nodes]
    assert not plan_streams(gm.graph, SLOW).gains
    assert not assign_streams_pass(gm, (), device=SLOW).modified
    assert [node.name for node in gm.graph.nodes] == before
    assert PLAN not in gm.meta
    assert not any(STREAM in node.meta for node in gm.graph.nodes)


def test_a_plan_with_a_gain_is_noted_and_results_stay_bitwise_the_same() -> None:
    gm = lowered(transformer())["bw"]
    inputs = values_of_inputs(gm)
    before, order = gm(*inputs), [node.name for node in gm.graph.nodes]
    assert assign_streams_pass(gm, (), device=SLOW).modified
    gm.graph.lint()
    gm.recompile()
    plan = gm.meta[PLAN]
    assert isinstance(plan, StreamPlan)
    assert plan.two.makespan < plan.one.makespan
    assert plan.two.busy(1) > 0
    assert tuple(node.name for node in gm.graph.nodes) == plan.order
    assert sorted(plan.order) == sorted(order)
    assert {node.name for node in gm.graph.nodes if STREAM in node.meta} == set(plan.side)
    after = gm(*inputs)
    assert len(after) == len(before)
    for a, b in zip(after, before, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_plan_with_a_race_is_refused_before_anything_changes(
    graphs: dict[str, GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mhc_compile.passes.streams.synchronize", tuple)  # no syncs at all
    before = [node.name for node in graphs["bw"].graph.nodes]
    with pytest.raises(VerificationError, match="does not wait for"):
        assign_streams_pass(graphs["bw"], (), device=SLOW)
    assert [node.name for node in graphs["bw"].graph.nodes] == before


def test_a_second_run_changes_nothing() -> None:
    gm = lowered(transformer())["bw"]
    assert assign_streams_pass(gm, (), device=SLOW).modified
    order = [node.name for node in gm.graph.nodes]
    assert not assign_streams_pass(gm, (), device=SLOW).modified
    assert [node.name for node in gm.graph.nodes] == order


def test_a_graph_without_streams_is_left_alone() -> None:
    def look(gm: GraphModule, inputs: Any) -> Any:
        assert not assign_streams_pass(gm, (), device=SLOW).modified
        return gm.forward

    torch.compile(nn.Linear(2, 2), backend=look)(torch.randn(2, 2))


def test_sizes_may_be_symbolic() -> None:
    x = torch.randn(SHAPE)
    torch._dynamo.mark_dynamic(x, 1)
    found = lowered(transformer(), x)
    values = [node.meta["val"] for node in found["bw"].graph.find_nodes(op="placeholder")]
    assert any(isinstance(value, torch.SymInt) for value in values)
    plan = plan_streams(found["bw"].graph, SLOW)
    assert plan.gains
    assert find_races(plan.program) == []


def test_random_assignments_of_three_streams_are_sound(graphs: dict[str, GraphModule]) -> None:
    rng = random.Random(0)
    for gm in graphs.values():
        kernels = [node for node in gm.graph.nodes if launches(node)]
        streams = {node: rng.randrange(3) for node in kernels}
        program = synchronize(steps_of(gm.graph.nodes, streams))
        assert find_races(program) == []
        assert sanitizer_errors(program) == 0
        for step, mutant in rng.sample(list(mutants(program)), 25):
            assert find_races(mutant), step
            assert sanitizer_errors(mutant), step


@pytest.fixture(scope="module")
def parallel() -> dict[str, GraphModule]:
    """Graphs of a tensor parallel plan: all-reduces forward and backward."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x = torch.randn(2, 6, 16)
        _, graphs = lowered_graphs(parallel_stack(init_device_mesh("cpu", (2,)), x), x)
        return {graph.phase: graph.gm for graph in graphs}
    finally:
        dist.destroy_process_group()


def test_collectives_run_on_the_link_and_their_waits_on_the_main_stream(
    parallel: dict[str, GraphModule],
) -> None:
    for gm in parallel.values():
        plan = plan_streams(gm.graph, SLOW)
        assert_sound(plan.program)
        links = [step for step in plan.program if isinstance(step, Launch) and step.link]
        assert {step.link for step in links} == {"start", "wait"}
        assert {step.stream for step in links} == {0}
        assert plan.two.busy(LINK) == plan.one.busy(LINK) > 0


def test_no_node_moves_before_what_it_has_to_come_after(parallel: dict[str, GraphModule]) -> None:
    for gm in parallel.values():
        nodes = list(gm.graph.nodes)
        before = dependences(nodes)
        order = deferred_order(gm.graph, side_kernels(gm.graph))
        position = {node: number for number, node in enumerate(order)}
        assert sorted(order) == nodes
        assert all(position[b] < position[node] for node in nodes for b in before[node])


@pytest.mark.parametrize("recompute", ["off", "auto"])
def test_every_sync_of_a_plan_is_missed_by_the_checker_and_by_the_sanitizer(
    recompute: Any,
) -> None:
    for gm in lowered(transformer(), recompute=recompute).values():
        assert assert_sound(plan_streams(gm.graph).program) > 5


def assert_plans_sound(name: str) -> None:
    """Plans of a model of the zoo: no race, and no sync too many."""
    model, inputs = build(name)
    model.train()
    _, found = lowered_graphs(model, config=MHCConfig(kernels="reference"), **inputs)
    for graph in found:
        assert_sound(plan_streams(graph.gm.graph).program)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_plans_of_real_models_are_sound(name: str) -> None:
    assert_plans_sound(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama", "resnet18", "t5", "mixtral", "gemma2", "bert", "whisper", "mamba", "swin_hf", "dit"],
)
def test_plans_of_more_models_are_sound(name: str) -> None:
    assert_plans_sound(name)
