"""Each private or undocumented part of torch that we rely on exists and behaves as we use it."""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mhc_compile import ConfigError, UnsupportedGraphError
from mhc_compile import _torch_private as private
from mhc_compile._torch_private import lowering, streams
from mhc_compile.passes.owners import module_calls
from tests.nets import WIDTH, Block, Net, example


class Backend:
    """Calls ``look`` on each frame and its graph, and runs the graph as it is."""

    def __init__(self, look: Callable[[private.Frame, GraphModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.seen.append(self.look(private.Frame.current(gm), gm))
        return gm.forward


def look_at(
    model: Callable[..., Any], look: Callable[[private.Frame, GraphModule], Any], *args: Any
) -> list[Any]:
    backend = Backend(look)
    torch.compile(model, backend=backend)(*args)
    return backend.seen


def test_the_defaults_our_advice_speaks_of_are_these() -> None:
    assert torch._dynamo.config.optimize_ddp is True
    assert torch._dynamo.config.recompile_limit == 8


def test_a_frame_knows_its_root_its_modules_and_their_names() -> None:
    model = Net()

    def look(frame: private.Frame, gm: GraphModule) -> None:
        assert frame.root is model
        assert not frame.is_partial
        assert frame.modules[id(model.blocks[1])] is model.blocks[1]
        assert frame.names[id(model.blocks[1])] == "blocks.1"
        assert frame.where.startswith("forward (")
        assert "nets.py:" in frame.where

    assert look_at(model, look, example()) == [None]


def test_a_module_of_torch_is_the_root_of_its_frame() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    assert look_at(model, lambda frame, gm: frame.root, example()) == [model]


def test_a_function_has_no_root() -> None:
    assert look_at(lambda x: x * 2, lambda frame, gm: frame.root, example()) == [None]


def test_frames_around_a_graph_break_are_partial() -> None:
    class Breaks(nn.Module):
        factor = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return x * self.factor

    model = Breaks()

    def look(frame: private.Frame, gm: GraphModule) -> tuple[bool, bool]:
        return frame.is_partial, frame.root is model

    assert look_at(model, look, example()) == [(True, True), (True, True)]


def test_outside_of_dynamo_there_is_no_frame() -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(UnsupportedGraphError, match=r"inside torch.compile only"):
        private.Frame.current(gm)


def test_placeholders_have_their_source_and_the_value_to_come() -> None:
    model, x = Net(), example()

    def look(frame: private.Frame, gm: GraphModule) -> set[int]:
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        assert all(node._dynamo_source is not None for node in inputs)
        return {id(private.example_of(node)) for node in inputs}

    (values,) = look_at(model, look, x)
    assert values == {id(x), *map(id, model.parameters())}


def test_module_calls_are_keyed_by_identity_and_path() -> None:
    shared = Block()
    model = Net([shared, Block(), shared])

    def look(frame: private.Frame, gm: GraphModule) -> list[tuple[str, str]]:
        calls = [module_calls(node) for node in gm.graph.nodes if node.target is torch.relu]
        assert all(len(stack) == 2 for stack in calls)
        assert all(stack[0].call == "" for stack in calls)
        return [(stack[1].module, stack[1].call) for stack in calls]

    (((first, a), (second, b), (again, c)),) = look_at(model, look, example())
    assert (first, second, again) == (str(id(shared)), str(id(model.blocks[1])), str(id(shared)))
    assert len({a, b, c}) == 3


def test_a_module_called_twice_under_one_name_has_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x))

    def look(frame: private.Frame, gm: GraphModule) -> list[str]:
        return [module_calls(node)[1].call for node in gm.graph.nodes if node.target is torch.relu]

    ((a, b),) = look_at(Twice(), look, example())
    assert a != b


class Lifts(nn.Module):
    """Has a parameter that its forward never touches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def lifting(received: list[Any], root: nn.Module) -> Callable[..., Any]:
    """A backend that lifts ``root.inner.weight`` and notes what arrives for it."""

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        frame = private.Frame.current(gm)
        copy, _ = private.copy_captured(gm)
        node = frame.lift(root, ("inner",), "weight")
        assert frame.lift(root, ("inner",), "weight") is node
        position = [n for n in gm.graph.nodes if n.op == "placeholder"].index(node)

        def call(*args: Any) -> Any:
            received.append(args[position])
            return copy(*args[:position], *args[position + 1 :])

        return call

    return backend


def test_a_lifted_parameter_arrives_at_each_call_and_is_guarded() -> None:
    model, x, received = Lifts(), example(), []
    step = torch.compile(model, backend=lifting(received, model))
    torch._dynamo.utils.counters.clear()
    assert torch.equal(step(x), x * 2)
    step(x)
    assert received == [model.inner.weight] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.inner.weight.requires_grad_(False)
    step(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_copy_of_a_captured_graph_leaves_it_whole() -> None:
    def look(frame: private.Frame, gm: GraphModule) -> None:
        before = str(gm.graph)
        copy, where = private.copy_captured(gm)
        assert set(where) == {n for n in gm.graph.nodes if n.op != "output"}
        for node in list(copy.graph.nodes):
            if node.op == "placeholder":
                assert node._dynamo_source is not None
        copy.graph.output_node().args = ((),)
        copy.graph.eliminate_dead_code()
        assert str(gm.graph) == before

    look_at(Net(), look, example())


def test_a_checkpoint_is_an_operator_on_a_body_and_its_policy_hangs_on_the_body() -> None:
    block = Block()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    def selective(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    def contexts() -> Any:
        return torch.utils.checkpoint.create_selective_checkpoint_contexts(
            lambda *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE
        )

    def look(frame: private.Frame, gm: GraphModule) -> tuple[int, bool]:
        operator = torch.ops.higher_order.tag_activation_checkpoint
        (call,) = (node for node in gm.graph.nodes if node.target is operator)
        body = getattr(gm, call.args[0].target)
        inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
        return len(call.args) - 1 - len(inputs), "_checkpoint_context_fn" in body.meta

    assert look_at(plain, look, example()) == [(0, False)]
    torch.compiler.reset()
    assert look_at(selective, look, example()) == [(0, True)]


def test_recompute_tags_reach_the_partitioner_and_save_memory() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.tanh(x @ x)
        return x

    def saved_bytes(tag: bool) -> int:
        def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            for node in gm.graph.nodes if tag else ():
                if node.op == "call_function":
                    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                    node.meta["ac_graph_id"] = 0
            return private.compile_aot_eager(gm, inputs)

        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.compiler.reset()
        x = torch.randn(16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.compile(chain, backend=backend)(x)
        return sum(saved.values())

    assert saved_bytes(tag=True) == 16 * 16 * 4  # the input alone
    assert saved_bytes(tag=False) > 3 * 16 * 16 * 4


@pytest.mark.parametrize("lower", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_extra_fake_input_is_compiled_with_the_sizes_of_its_neighbour(lower: str) -> None:
    def backend(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        copy, _ = private.copy_captured(gm)
        inputs = [node for node in copy.graph.nodes if node.op == "placeholder"]
        visible: torch.Tensor = inputs[-1].meta["example_value"]
        with copy.graph.inserting_after(inputs[-1]):
            extra = copy.graph.placeholder("extra")
        extra._dynamo_source = None
        (output,) = copy.graph.output_node().args[0]
        with copy.graph.inserting_after(output):
            total = copy.graph.call_function(torch.add, (output, extra))
        copy.graph.output_node().args = ((total,),)
        copy.recompile()
        examples = [*map(private.example_of, inputs), private.fake_like(visible, visible.shape)]
        call = (
            private.compile_aot_eager(copy, examples)
            if lower == "aot_eager"
            else private.compile_inductor(copy, examples, None)
        )
        return private.without_tracing(lambda *args: call(*args, torch.ones_like(args[-1])))

    step = torch.compile(lambda x: x * 2, backend=backend)
    for shape in ((2, 5), (3, 5), (4, 7)):
        x = example(*shape)
        assert torch.equal(step(x), x * 2 + 1)


def test_a_lowering_sees_the_forward_and_the_backward_graph() -> None:
    seen = {}

    def backend(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        copy, _ = private.copy_captured(gm)
        inputs = [private.example_of(n) for n in copy.graph.nodes if n.op == "placeholder"]
        return private.compile_aot_eager(copy, inputs, private.Lowering(look, "", ()))

    def look(phase: str, gm: GraphModule) -> bool:
        seen[phase] = {str(node.target) for node in gm.graph.nodes}
        return False

    x = example().requires_grad_()
    torch.compile(lambda x: torch.tanh(x).sum(), backend=backend)(x).backward()
    assert list(seen) == ["joint", "fw", "bw"]
    assert "aten.tanh.default" in seen["joint"]
    assert "aten.tanh.default" in seen["fw"] - seen["bw"]


def test_inductor_has_a_place_for_passes_of_others_and_a_key_for_them() -> None:
    from torch._inductor import config, custom_graph_pass  # noqa: TID251 - what we build on

    for place in (config.joint_custom_post_pass, config.post_grad_custom_post_pass):
        assert custom_graph_pass.get_custom_graph_passes(place) == ()
    assert config.reorder_for_peak_memory
    one, other = (private.Lowering(lambda phase, gm: False, key, (__file__,)) for key in "12")
    for phase in ("joint", None):
        assert lowering._last_pass(one, phase).uuid() != lowering._last_pass(other, phase).uuid()
    assert not private.schedules_collectives()
    with config.patch(reorder_for_compute_comm_overlap=True):
        assert private.schedules_collectives()


def test_inductor_knows_the_modes_of_torch_compile() -> None:
    from torch._inductor import list_mode_options  # noqa: TID251 - what we pass on

    assert "max_autotune" in list_mode_options("max-autotune")


def test_an_error_of_ours_leaves_torch_compile_as_it_is() -> None:
    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise private.passing_through(ConfigError("what is allowed"))

    with pytest.raises(ConfigError, match=r"^what is allowed") as caught:
        torch.compile(lambda x: x * 2, backend=backend)(example())
    assert isinstance(caught.value, ValueError)


def test_an_attribute_of_a_storage_is_seen_through_aliases_and_dies_with_it() -> None:
    class Thing:
        pass

    tensor = torch.randn(3)
    thing = Thing()
    alive = weakref.ref(thing)
    tensor.untyped_storage()._mhc = thing
    del thing
    gc.collect()
    alias = tensor.view(3, 1)
    del tensor
    assert alias.untyped_storage()._mhc is alive()
    del alias
    gc.collect()
    assert alive() is None


def test_per_module_compilation_lives_in_one_attribute() -> None:
    block = Block()
    assert block._compiled_call_impl is None
    block.compile(backend="eager")
    assert block._compiled_call_impl is not None


def test_parameters_take_their_sources_from_the_nearest_module_in_reach() -> None:
    class Inputless(nn.Module):
        """Reached through another module's list only."""

        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ModuleList(Lifts() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in self.many:
                x = module(x)
            return x

    model, x, received = Inputless(), example(), []
    torch.compile(model, backend=lifting(received, model.many[2]))(x)
    assert received == [model.many[2].inner.weight]


def test_a_module_out_of_reach_cannot_be_lifted_from() -> None:
    stranger = Lifts()
    with pytest.raises(Exception, match=r"no variable of .* leads to the Lifts"):
        torch.compile(Net(), backend=lifting([], stranger))(example())


def test_autograd_shows_the_joint_the_forward_and_the_backward_graph() -> None:
    seen: dict[str, set[str]] = {}
    prepared: list[GraphModule] = []

    def look(frame: private.Frame, gm: GraphModule) -> None:
        copy, _ = private.copy_captured(gm)
        inputs = [private.example_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
        private.trace_autograd(
            copy,
            inputs,
            lambda phase, g: seen.update({phase: {str(n.target) for n in g.graph.nodes}}),
            prepared.append,
        )

    look_at(lambda x: torch.tanh(x).sum(), look, torch.randn(3, requires_grad=True))
    assert {"aten.tanh.default", "aten.sum.default"} <= seen["joint"]
    assert "aten.tanh.default" in seen["fw"]
    assert "aten.tanh.default" not in seen["bw"]
    assert len(prepared) == 1
    seen.clear()
    look_at(lambda x: torch.tanh(x).sum(), look, torch.randn(3))
    assert list(seen) == ["fw"]
    assert len(prepared) == 1


def test_the_bodies_of_custom_ops_are_plain_functions() -> None:
    bodies = private.custom_op_bodies("mhc")
    body = bodies[torch.ops.mhc.expand.default]
    x = torch.randn(2, 3)
    assert torch.equal(body(x, 4, -1), torch.ops.mhc.expand(x, 4, -1))
    assert {torch.ops.mhc.pre.default, torch.ops.mhc.post_backward.default} <= set(bodies)


def test_a_named_object_is_the_same_at_every_call_of_the_graph_that_was_compiled_with_it() -> None:
    from torch._dynamo.graph_bytecode_inputs import get_external_object_by_index

    event, seen = torch.Event("cpu"), []

    def backend(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        number = private.name_object(event)

        def call(*args: Any) -> Any:
            seen.append(get_external_object_by_index(number) is event)
            return gm(*args)

        return call

    step = torch.compile(lambda x: x * 2, backend=backend)
    for _ in range(2):
        assert torch.equal(step(torch.ones(2)), 2 * torch.ones(2))
    assert seen == [True, True]


def test_torch_has_the_operators_for_streams_and_a_place_for_the_current_one() -> None:
    table = private.torch_streams()
    for operator in (table.record, table.wait):
        assert [argument.name for argument in operator._schema.arguments][1] == "stream_index"
        assert torch.fx.Graph().call_function(operator, (1, 0)).is_impure()
    hold = torch.fx.Graph().call_function(table.hold, (None, 0))
    assert [argument.name for argument in table.hold._schema.arguments] == [
        *("tensor", "stream_index"),
    ]
    assert hold.is_impure()
    assert table.current == 0


def test_there_is_one_side_stream_for_each_device() -> None:
    device = torch.device("cpu")
    assert streams._side_stream(device) is streams._side_stream(device)


def test_graph_breaks_are_noted_and_what_the_user_logs_stays_the_same() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x * 2

    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    before = logger.level, logger.propagate, list(logger.handlers)
    with private.watch_breaks() as breaks:
        torch.compile(Breaks(), backend="eager")(example())
    line = Breaks.forward.__code__.co_firstlineno + 1
    assert [entry.source for entry in breaks] == [f"test_torch_private.py:{line}"]
    assert "User-inserted graph break" in breaks[0].reason
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_frame_tells_which_module_runs_its_graph_now() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2 if self.training else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    running: list[tuple[nn.Module | None, nn.Module | None]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        frame = private.Frame.current(gm)
        captured = frame.root

        @private.without_tracing
        def run(*args: Any) -> Any:
            running.append((captured, frame.running_root()))
            return gm.forward(*args)

        return run

    net = Net()
    torch.compile(net, backend=backend)(torch.ones(2))
    first, second = net.blocks
    # two graphs, each captured from the first block and run by both
    assert running == [(first, first), (first, first), (first, second), (first, second)]
