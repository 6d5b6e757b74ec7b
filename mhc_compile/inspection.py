"""Watch a model go through the passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile._torch_private import (
    copy_captured,
    passing_through,
    reset_dynamo,
    trace_autograd,
)
from mhc_compile.backend import compile_frame
from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_, is_converted, revert_
from mhc_compile.errors import MHCError
from mhc_compile.mlir import check_mlir
from mhc_compile.passes.widen import Widening
from mhc_compile.pipeline import Pass, joint_passes, lowered_passes, run_passes
from mhc_compile.recorder import GraphRecord, Recorder
from mhc_compile.report import Report
from mhc_compile.stages import DumpOptions


def trace_stages(
    model: nn.Module,
    *args: Any,
    config: MHCConfig | None = None,
    options: DumpOptions | None = None,
    **kwargs: Any,
) -> tuple[Report, Recorder]:
    """Convert ``model``, record its graphs before and after each pass, and convert it back.

    Args:
        model: any module; a converted one stays converted.
        *args: example inputs, as the model takes them.
        config: choices; the defaults if None.
        options: what to keep of the graphs.
        **kwargs: further example inputs.

    Returns:
        The report of the conversion, and a `Stage` for every graph and every pass that changed it.

    Raises:
        ConfigError: MLIR is wanted and cannot be made.
        UnsupportedGraphError: the model cannot be converted, or not be lowered to the MLIR dialect.
    """
    options = options or DumpOptions()
    if "mlir" in options.formats:
        check_mlir(options.mlir_dialect, options.mlir_custom)
    recorder = Recorder(options)
    return _watch(recorder, model, args, kwargs, config or MHCConfig()), recorder


@dataclass(slots=True)
class LoweredGraph:
    """A graph of AOTAutograd."""

    graph: int
    """Which graph of the model; more than one means graph breaks."""
    phase: str
    """``fw`` or ``bw``."""
    gm: GraphModule


def lowered_graphs(
    model: nn.Module, *args: Any, config: MHCConfig | None = None, **kwargs: Any
) -> tuple[Report, list[LoweredGraph]]:
    """The graphs of AOTAutograd as they are compiled; the model is converted back.

    Args:
        model: as for `trace_stages`, like ``config``.
        *args: example inputs, as the model takes them.
        config: choices; the defaults if None.
        **kwargs: further example inputs.

    Returns:
        The report of the conversion, and the forward and backward graph of every graph; without
        gradients the forward graph alone.

    Raises:
        UnsupportedGraphError: the model cannot be converted.
    """
    config = config or MHCConfig()
    recorder = _LoweredRecorder(joint=joint_passes(config.skip_passes))
    report = _watch(recorder, model, args, kwargs, config)
    passes = lowered_passes(config.skip_passes, overlap=config.overlap)
    for graph in recorder.lowered:
        run_passes(graph.gm, (), passes)
    return report, recorder.lowered


@dataclass(slots=True, kw_only=True)
class _LoweredRecorder(Recorder):
    """Keeps the graphs of AOTAutograd, which others would only write down."""

    joint: list[tuple[str, Pass]]
    """What happens to them before they are cut in two."""
    lowered: list[LoweredGraph] = field(default_factory=list)

    def start(self) -> GraphRecord:
        kept: dict[str, Any] = {"lowered": self.lowered, "joint": self.joint}
        self.graphs.append(_LoweredRecord(len(self.graphs), self.options, **kept))
        return self.graphs[-1]


@dataclass(slots=True, kw_only=True)
class _LoweredRecord(GraphRecord):
    lowered: list[LoweredGraph]
    joint: list[tuple[str, Pass]]

    def rewritten(self, gm: GraphModule, widening: Widening, inputs: Sequence[Any]) -> None:
        def see(phase: str, traced: GraphModule) -> None:
            if phase != "joint":
                self.lowered.append(LoweredGraph(self.number, phase, traced))

        copy, _ = copy_captured(gm)
        trace_autograd(copy, inputs, see, lambda joint: run_passes(joint, (), self.joint))


def _watch(
    recorder: Recorder,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: MHCConfig,
) -> Report:
    """Compile ``model`` with a recorder at hand, and leave it as it was."""
    converted_before = is_converted(model)
    report = convert_(model, *args, config=config, **kwargs)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            eager = replace(config, inner="eager")
            return compile_frame(gm, eager, frozenset({"inner"}), recorder=recorder)
        except MHCError as error:
            raise passing_through(error) from error.__cause__

    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        reset_dynamo()
        if not converted_before:
            revert_(model)
    return report
