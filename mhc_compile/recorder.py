"""Watch graphs go through the passes, and keep what a dump shows of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile._torch_private import (
    Frame,
    copy_captured,
    trace_artifact,
    trace_autograd,
)
from mhc_compile.analysis import Analysis
from mhc_compile.capture import Capture, TrunkPiece
from mhc_compile.config import MHCConfig
from mhc_compile.graph_text import traffic
from mhc_compile.hosts import erase_markers
from mhc_compile.kernels.cpp.emit import Part
from mhc_compile.kernels.cpp.emit import source as cpp_source
from mhc_compile.kernels.cpp.select import obstacle
from mhc_compile.mlir import to_mlir
from mhc_compile.passes.overlap import Overlap
from mhc_compile.passes.states import spec_of
from mhc_compile.passes.values import source_frame, source_line, value_of
from mhc_compile.passes.widen import Widening
from mhc_compile.pictures.build import build_view
from mhc_compile.pictures.trunks import (
    Nesting,
    Spine,
    nesting_of,
    planned_spine,
    rewritten_spine,
)
from mhc_compile.pictures.view import GraphView
from mhc_compile.pipeline import Observer, joint_passes, run_passes
from mhc_compile.report import Report
from mhc_compile.reporting import build_report
from mhc_compile.stages import AFTER, DumpOptions, Stage, make_stage
from mhc_compile.uses import site_uses

_AROUND = 3
"""Source lines shown before and after an add."""


@dataclass(slots=True)
class Recorder:
    """Everything a dump is made of, graph by graph."""

    options: DumpOptions = field(default_factory=DumpOptions)
    directory: Path | None = None
    """Where each compilation is dumped as soon as it is recorded; None: somebody else does it."""
    graphs: list["GraphRecord"] = field(default_factory=list)

    def start(self) -> "GraphRecord":
        """The record of the next graph."""
        self.graphs.append(GraphRecord(len(self.graphs), self.options))
        return self.graphs[-1]

    @property
    def stages(self) -> list[Stage]:
        """Of all graphs."""
        return [stage for graph in self.graphs for stage in graph.stages]

    @property
    def report(self) -> Report:
        """What was found in all graphs."""
        return merged([graph.report for graph in self.graphs if graph.report is not None])


@dataclass(slots=True)
class GraphRecord:
    """One graph from its capture to its rewritten form."""

    number: int
    options: DumpOptions
    stages: list[Stage] = field(default_factory=list)
    report: Report | None = None
    traffic: list[dict[str, Any]] = field(default_factory=list)
    """Bytes of the mhc ops, see `mhc_compile.graph_text.traffic`."""
    kernels: dict[str, str] = field(default_factory=dict)
    """File name -> generated source."""
    excerpts: dict[str, str] = field(default_factory=dict)
    """``file.py:123`` -> the user's lines around it."""
    nesting: Nesting = field(default_factory=Nesting)
    overlap: list[Overlap] = field(default_factory=list)
    """Of every AOTAutograd graph in which work moved."""

    def observe(self, name: str, gm: GraphModule) -> None:
        """See a graph as captured ("before"), or after a pass."""
        if name == "before":
            gm = _unmarked(gm)
        number = sum(stage.phase == "fw" for stage in self.stages)
        self._keep(gm, number, name)

    def analysed(
        self, analysis: Analysis, frame: Frame, config: MHCConfig, inputs: Sequence[Any]
    ) -> None:
        """See the plan of a graph, before anything is rewritten."""
        pieces = [TrunkPiece(0, trunk) for trunk in range(len(analysis.plan.trunks))]
        capture = Capture([analysis], pieces, 1)
        root = frame.root or nn.Module()
        self.report = build_report(root, capture, config, site_uses(capture), converted=True)
        names = {index: site.name for index, site in enumerate(self.report.sites)}
        self.nesting = nesting_of(analysis.plan)
        spine = planned_spine(analysis.plan, names)
        self.stages[0] = replace(self.stages[0], view=self._view(analysis.gm, spine))
        for site in analysis.residuals.sites:
            self._excerpt(site.root)
        for rejected in analysis.residuals.rejected:
            self._excerpt(rejected.root)
        self._autograd(analysis.gm, inputs, 0, "before")

    def rewritten(self, gm: GraphModule, widening: Widening, inputs: Sequence[Any]) -> None:
        """See the result of all passes."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, example in zip(placeholders, inputs, strict=True):
            if value_of(node) is None:  # a state from another graph
                node.meta["example_value"] = example
        self.nesting = self.nesting.with_lanes(widening.lanes)
        self._keep(gm, AFTER, "after")
        self.stages[-1] = replace(self.stages[-1], view=self._view(gm, rewritten_spine(gm.graph)))
        self.traffic = traffic(gm)
        self.kernels = dict(_kernel_sources(gm))
        self._autograd(gm, inputs, AFTER, "after")

    def lowering(self, phase: str, gm: GraphModule) -> Observer:
        """See the passes on a graph of AOTAutograd, if they change it.

        Args:
            phase: "fw" or "bw".
            gm: the graph before them.
        """
        stages = [self._stage(gm, 0, "before", f"aot_{phase}")]

        def observe(name: str, gm: GraphModule) -> None:
            if len(stages) == 1:
                self._add(stages[0])
            stages.append(self._stage(gm, len(stages), name, f"aot_{phase}"))
            self._add(stages[-1])

        return observe

    def _keep(self, gm: GraphModule, number: int, name: str, phase: str = "fw") -> None:
        self._add(self._stage(gm, number, name, phase))

    def _stage(self, gm: GraphModule, number: int, name: str, phase: str) -> Stage:
        return make_stage(
            gm, self.options, graph=self.number, number=number, name=name, phase=phase
        )

    def _add(self, stage: Stage) -> None:
        self.stages.append(stage)
        trace_artifact(f"mhc_{stage.phase}_{stage.stem}_graph_{self.number}", lambda: stage.text)

    def _view(self, gm: GraphModule, spine: Spine) -> GraphView:
        options = self.options
        return build_view(
            gm.graph,
            spine,
            self.nesting,
            collapse=options.collapse,
            fold=options.fold,
            max_nodes=options.max_nodes,
        )

    def _autograd(self, gm: GraphModule, inputs: Sequence[Any], number: int, name: str) -> None:
        """Record the joint and the backward graph, and MLIR of the forward one."""
        if not self.options.needs_autograd:
            return

        def see(phase: str, traced: GraphModule) -> None:
            if phase != "fw":
                if phase not in self.options.phases:
                    return
                self._keep(traced, number, name, phase)
            if "mlir" in self.options.formats:
                self._add_mlir(traced, phase, number)

        copy, _ = copy_captured(gm)
        trace_autograd(copy, inputs, see, lambda joint: run_passes(joint, (), joint_passes()))

    def _add_mlir(self, traced: GraphModule, phase: str, number: int) -> None:
        """Add the MLIR of an AOTAutograd graph to its stage."""
        options = self.options
        text = to_mlir(traced, dialect=options.mlir_dialect, custom=options.mlir_custom)
        for i, stage in enumerate(self.stages):
            if (stage.phase, stage.number) == (phase, number):
                self.stages[i] = replace(stage, files={**stage.files, "mlir": text})

    def _excerpt(self, node: Node) -> None:
        path, line = source_frame(node)
        name = source_line(node)
        if not name or name in self.excerpts or not Path(path).is_file():
            return
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        numbers = range(max(1, line - _AROUND), min(len(lines), line + _AROUND) + 1)
        self.excerpts[name] = "\n".join(
            f"{'>' if number == line else ' '} {number:5d}  {lines[number - 1]}"
            for number in numbers
        )


def _unmarked(gm: GraphModule) -> GraphModule:
    """A copy of a captured graph without the markers of converted modules, and their inputs."""
    copy, _ = copy_captured(gm)
    read = [n for n in copy.graph.nodes if n.op == "placeholder" and n.users]
    erase_markers(copy.graph)
    for placeholder in read:
        if not placeholder.users:
            copy.graph.erase_node(placeholder)
    copy.recompile()
    return copy


_CPP_PARTS: dict[Any, Part] = {
    torch.ops.mhc.pre.default: "site",
    torch.ops.mhc.seam.default: "site",
    torch.ops.mhc.seam_norm.default: "normed",
}


def _kernel_sources(gm: GraphModule) -> Iterator[tuple[str, str]]:
    """(file name, C++) of every kernel that the mhc ops of a graph call for."""
    for node in gm.graph.nodes:
        if node.target not in _CPP_PARTS:
            continue
        spec, state = spec_of(node), node.args[0]
        X = value_of(state) if isinstance(state, Node) else None
        if spec.kernels == "reference" or not isinstance(X, torch.Tensor):
            continue
        if obstacle(spec, X) is None:
            dtype = str(X.dtype).removeprefix("torch.")
            part = _CPP_PARTS[node.target]
            norm = f"_{spec.branch_norm}" if part == "normed" else ""
            name = f"{spec.constraint}_n{spec.streams}{norm}_{dtype}.cpp"
            yield name, cpp_source(spec, X.dtype, part)


def merged(reports: Sequence[Report]) -> Report:
    """One report of several graphs; trunks are numbered through."""
    models = dict.fromkeys(report.model for report in reports)
    first = 0
    sites, trunks = [], []
    for report in reports:
        sites += [replace(s, trunk=s.trunk + first if s.trunk >= 0 else -1) for s in report.sites]
        trunks += [replace(trunk, index=trunk.index + first) for trunk in report.trunks]
        first += len(report.trunks)
    return Report(
        model=", ".join(models),
        config=reports[0].config if reports else {},
        graphs=sum(report.graphs for report in reports),
        sites=tuple(sites),
        trunks=tuple(trunks),
        rejected=tuple(add for report in reports for add in report.rejected),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )


_OF_PROCESS: dict[str, Recorder] = {}


def recorder_of_environment(environment: Mapping[str, str] = os.environ) -> Recorder | None:
    """The recorder that ``MHC_DUMP=DIR`` or ``TORCH_TRACE=DIR`` ask for; None without them.

    One for the whole process: every compilation is another graph of the same dump. The processes
    of ``torchrun`` dump into folders of their own.
    """
    target = environment.get("MHC_DUMP", "")
    if not target and "TORCH_TRACE" not in environment:
        return None
    if target not in _OF_PROCESS:
        directory = Path(target) if target else None
        if directory is not None and int(environment.get("WORLD_SIZE", "1")) > 1:
            directory = directory / f"rank_{environment.get('RANK', '0')}"
        _OF_PROCESS[target] = Recorder(directory=directory)
    return _OF_PROCESS[target]
