"""From a graph of Dynamo to something that runs: AOTAutograd, its partitioner, Inductor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule

Compiled = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Lowering:
    """Changes that graphs of AOTAutograd go through before they run, or Inductor compiles them."""

    run: Callable[[str, GraphModule], bool]
    """Changes a graph in place, of phase "joint" before it is cut in two, then "fw" and "bw";
    returns whether the order is to stay."""
    key: str
    """Settings that the result depends on; part of Inductor's cache key."""
    files: tuple[str, ...]
    """Source files that it depends on, likewise."""
    side_stream: bool = False
    """Whether it may put work on a second stream. Streams and events are numbers in the graph, and
    mean objects of this process: nothing that is made of it goes to a cache."""


def compile_inductor(
    gm: GraphModule, inputs: Sequence[Any], mode: str | None, lowering: Lowering | None = None
) -> Compiled:
    """Inductor's own entry point, with the settings of a ``torch.compile`` mode.

    Args:
        gm: the graph, which is consumed.
        inputs: its example inputs.
        mode: of ``torch.compile``.
        lowering: what happens to the graphs behind all graph passes of Inductor (and of the user).
            Not if Inductor finds a result in its cache: there it has been done.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    patches: dict[str, Any] = list_mode_options(mode) if mode else {}
    if lowering is not None:
        for place, phase in (
            ("joint_custom_post_pass", "joint"),
            ("post_grad_custom_post_pass", None),
        ):
            own = get_custom_graph_passes(getattr(config, place))
            patches[place] = (*own, _last_pass(lowering, phase))
        # What is patched returns to its value behind each graph, whatever a pass makes of it.
        patches.setdefault("reorder_for_peak_memory", config.reorder_for_peak_memory)
        if lowering.side_stream:
            # Inductor would reuse a buffer behind its last reader in the program, which may be
            # running still on the other stream; torch's allocator knows who holds a block.
            patches["allow_buffer_reuse"] = False
    return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]


def _last_pass(lowering: Lowering, phase: str | None) -> Any:
    """``lowering`` in a place that Inductor has for graph passes of others; None is fw or bw."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class LastPass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            module = graph.owning_module
            assert module is not None
            if lowering.run(phase or _phase(), module):
                config.reorder_for_peak_memory = False  # it might undo the order

        def uuid(self) -> Any:
            if lowering.side_stream:
                return None
            return get_hash_for_files(lowering.files, lowering.key)

    return LastPass()


def compile_aot_eager(
    gm: GraphModule, inputs: Sequence[Any], lowering: Lowering | None = None
) -> Compiled:
    """AOTAutograd with its partitioner, and graphs that run operation by operation.

    Args:
        gm: the graph.
        inputs: its example inputs.
        lowering: what happens to the graph of both directions, then to the forward and to the
            backward one.
    """
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if lowering is not None:
            lowering.run("joint", joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    def compiler(traced: GraphModule, traced_inputs: Sequence[Any]) -> Any:
        if lowering is not None:
            lowering.run(_phase(), traced)
        return nop(traced, traced_inputs)

    return aot_autograd(fw_compiler=compiler, partition_fn=partition)(gm, inputs)


def _phase() -> str:
    """Which graph AOTAutograd has compiled right now: "fw" (with or without gradients) or "bw"."""
    from torch._functorch._aot_autograd.logging_utils import get_graph_being_compiled

    return "bw" if "backward" in get_graph_being_compiled() else "fw"


def schedules_collectives() -> bool:
    """Whether the user has Inductor itself move collectives and waits apart."""
    from torch._inductor import config

    return bool(
        config.aten_distributed_optimizations.enable_overlap_scheduling
        or config.reorder_for_compute_comm_overlap
    )


def trace_autograd(
    gm: GraphModule,
    inputs: Sequence[Any],
    see: Callable[[str, GraphModule], None],
    prepare: Callable[[GraphModule], object],
) -> None:
    """Show what AOTAutograd makes of a graph: "joint", "fw" and "bw"; without gradients "fw".

    Args:
        gm: the graph.
        inputs: its example inputs.
        see: gets a phase and its graph.
        prepare: changes the joint graph, when it has been seen and before it is cut in two.
    """
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        see("joint", joint)
        prepare(joint)
        forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
        see("fw", forward)
        see("bw", backward)
        return forward, backward

    def inference(forward: GraphModule, example_inputs: Sequence[Any]) -> Any:
        see("fw", forward)
        return nop(forward, example_inputs)

    aot_autograd(fw_compiler=nop, inference_compiler=inference, partition_fn=partition)(gm, inputs)


def memory_budget() -> float:
    """Share of the activations that AOTAutograd may keep, as the user has set it; 1 if not."""
    return float(torch._functorch.config.activation_memory_budget)
