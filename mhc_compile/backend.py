"""The backend: ``torch.compile(model, backend="mhc")``."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from mhc_compile import kernels, passes
from mhc_compile._torch_private import (
    Compiled,
    Frame,
    Lowering,
    compile_aot_eager,
    compile_inductor,
    copy_captured,
    example_of,
    memory_budget,
    passing_through,
    schedules_collectives,
)
from mhc_compile.analysis import analyse
from mhc_compile.awaited import await_inputs, awaited_examples
from mhc_compile.binding import bind, lift_parameters
from mhc_compile.borders import Borders
from mhc_compile.config import MHCConfig
from mhc_compile.crossings import ask_records
from mhc_compile.dump import write_recorded
from mhc_compile.errors import ConfigError, MHCError, MHCWarning
from mhc_compile.hosts import resolve_by_id
from mhc_compile.lazy import convert_now, watch_ends
from mhc_compile.match import Matches, settle_options, sites_of
from mhc_compile.pipeline import (
    ORDERING_PASSES,
    improving_passes,
    joint_passes,
    lowered_passes,
    rewrite_passes,
    run_passes,
)
from mhc_compile.recorder import GraphRecord, Recorder, recorder_of_environment

# What a compiled graph depends on besides the graph: the passes, and the layouts that ops promise.
_FILES = tuple(
    str(file) for room in (passes, kernels) for file in sorted(Path(room.__path__[0]).glob("*.py"))
)
_ONE_CONNECTION = (
    "CUDA_DEVICE_MAX_CONNECTIONS=1 puts the work of all streams into one queue, so that a side "
    "stream hides less: leave it unset with side_stream=True, or set side_stream=False"
)


def mhc(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one graph of a model with its residual trunks widened to n streams.

    Not called by hand: ``torch.compile(model, backend="mhc", options={...})``. A model that
    `mhc_compile.convert_` has prepared uses what was recorded there; any other is converted here,
    on its first call, with a warning.

    Args:
        gm: the captured graph; it is left as it is.
        example_inputs: ignored, Dynamo's own record of the inputs is complete.
        mode: a mode of ``torch.compile`` ("max-autotune", ...), for ``inner="inductor"``.
        options: fields of `MHCConfig`.

    Raises:
        ConfigError: an unknown option, a value that is not allowed, or one that contradicts the
            conversion.
        UnsupportedGraphError: the graph does not hold what conversion recorded.
    """
    del example_inputs
    try:
        config = MHCConfig.from_options(options)
        if mode is not None and config.inner != "inductor":
            raise ConfigError(f"mode={mode!r} is a setting of Inductor: it needs inner='inductor'")
        return compile_frame(
            gm,
            config,
            frozenset(options or ()),
            mode=mode,
            recorder=recorder_of_environment(),
        )
    except MHCError as error:
        raise passing_through(error) from error.__cause__


def compile_frame(
    gm: GraphModule,
    config: MHCConfig,
    given: frozenset[str] = frozenset(),
    *,
    mode: str | None = None,
    recorder: Recorder | None = None,
) -> Compiled:
    """`mhc` with the options resolved.

    Args:
        gm: the captured graph.
        config: how to convert, should the model be new, and what compiles the result.
        given: names of the options that were given; they must agree with the conversion.
        mode: see `mhc`.
        recorder: keeps the graph at every stage, for a dump.
    """
    record = recorder.start() if recorder is not None else None
    observe = record.observe if record is not None else None
    frame = Frame.current(gm)
    config = settle_options(frame.modules.values(), given, config)
    matches = Matches(frame, config)
    copy, where = copy_captured(gm)
    resolve = resolve_by_id(frame.modules, frame.root)
    analysis = analyse(
        copy,
        resolve,
        matches.refuse,
        observe,
        kernels=config.kernels,
        ask=ask_records(frame.root),
        starting=matches.starting,
        single_pass=config.single_pass,
    )
    examples = [example_of(node) for node in _inputs(gm)]
    if record is not None:
        record.analysed(analysis, frame, config, examples)
    piece = matches.check(analysis)
    known = len(matches.records)
    convert_now(analysis, matches, frame, config, examples)
    is_lazy = len(matches.records) > known
    borders = Borders(analysis, matches.records)
    node_of = lift_parameters(gm, analysis, matches.records, sites_of, frame, where)
    arriving = borders.arrive(copy.graph)
    widening = bind(analysis, matches.records, sites_of, node_of, arriving, borders.departures)
    run_passes(copy, (), rewrite_passes(widening), observe)
    borders.leave(copy, widening)
    improving = improving_passes(
        config.skip_passes, recompute=_recompute(config), seam_norm=config.seam_norm
    )
    run_passes(copy, (), improving, observe)
    nodes = _inputs(copy)
    given_inputs = [borders.example(n) if borders.is_state(n) else example_of(n) for n in nodes]
    inputs = awaited_examples(nodes, given_inputs)
    if recorder is not None and record is not None:
        record.rewritten(copy, widening, inputs)
        write_recorded(recorder)
    lowering = _lowering(config, recorder, record)
    compiled = borders.wrap(_lower(copy, inputs, config, mode, lowering))
    compiled = await_inputs(compiled, given_inputs)
    compiled = piece.wrap(compiled) if piece is not None else compiled
    return watch_ends(compiled, analysis, frame) if is_lazy else compiled


def _recompute(config: MHCConfig) -> int | Literal["auto", "off"]:
    """The setting in force: a memory budget given to torch leaves the choice to its solver."""
    if not torch.is_grad_enabled():  # nothing is kept, and blocks would only keep seams apart
        return "off"
    has_budget = memory_budget() != 1.0
    return "off" if config.recompute == "auto" and has_budget else config.recompute


def _lowering(
    config: MHCConfig, recorder: Recorder | None, record: GraphRecord | None
) -> Lowering | None:
    """What happens to the graphs of AOTAutograd; None if nothing."""
    overlap = "off" if schedules_collectives() else config.overlap
    report = record.overlap.append if record is not None else None
    side_stream = config.side_stream and config.inner == "inductor"  # others have one stream
    lowered = lowered_passes(
        config.skip_passes, overlap=overlap, side_stream=side_stream, report=report
    )
    if side_stream and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warnings.warn(_ONE_CONNECTION, MHCWarning, stacklevel=2)
    joint = joint_passes(config.skip_passes)
    if not (joint or lowered):
        return None

    def run(phase: str, gm: GraphModule) -> bool:
        if phase == "joint":
            run_passes(gm, (), joint)
            return False
        observe = record.lowering(phase, gm) if record is not None else None
        changed = run_passes(gm, (), lowered, observe)
        if changed and recorder is not None:
            write_recorded(recorder)
        return not ORDERING_PASSES.isdisjoint(changed)

    names = " ".join(name for name, _ in (*joint, *lowered))
    return Lowering(run, names, _FILES, side_stream)


def _lower(
    gm: GraphModule,
    inputs: list[Any],
    config: MHCConfig,
    mode: str | None,
    lowering: Lowering | None,
) -> Compiled:
    if not any(node.op.startswith("call") for node in gm.graph.nodes):
        return gm.forward  # one end of a call that runs in pieces
    if config.inner == "inductor":
        return compile_inductor(gm, inputs, mode, lowering)
    if config.inner == "aot_eager":
        return compile_aot_eager(gm, inputs, lowering)
    return gm.forward


def _inputs(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]
