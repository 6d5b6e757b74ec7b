"""What a dump keeps of a graph at one point of its way."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from mhc_compile.errors import ConfigError
from mhc_compile.graph_text import graph_data, op_counts, readable
from mhc_compile.passes.annotate import annotate_values
from mhc_compile.pictures.build import COLLAPSE, MAX_NODES, Collapse
from mhc_compile.pictures.view import GraphView

FORMATS = ("txt", "py", "json", "dot", "svg", "png", "html", "mlir")
PHASES = ("fw", "bw", "joint")
LOWERED = ("aot_fw", "aot_bw")
"""Graphs of AOTAutograd on their way through our own passes; recorded where those change one."""
DIALECTS = ("torch", "linalg", "stablehlo", "tosa")
CUSTOM = ("opaque", "decompose")
AFTER = 99
"""Number of the last stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpOptions:
    """What is written.

    Raises:
        ConfigError: an unknown format, phase or level.
    """

    formats: tuple[str, ...] = ("txt", "html")
    """Of `FORMATS`. Pictures (dot, svg, png) are drawn of the first and the last forward stage."""
    stage: str = "all"
    """``"all"``, ``"before"``, ``"after"`` or the name of a pass."""
    phases: tuple[str, ...] = ("fw",)
    """Of `PHASES`: Dynamo's graph, and what AOTAutograd makes of the graph before and after."""
    collapse: Collapse = "auto"
    fold: bool = True
    max_nodes: int = MAX_NODES
    """The last three are those of `mhc_compile.pictures.build.build_view`."""
    mlir_dialect: str = "torch"
    mlir_custom: str = "opaque"
    """How the mhc ops appear in MLIR: as calls, or as what they consist of."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, values, allowed in (
            ("format", self.formats, FORMATS),
            ("phase", self.phases, PHASES),
            ("collapse", (self.collapse,), COLLAPSE),
            ("mlir_dialect", (self.mlir_dialect,), DIALECTS),
            ("mlir_custom", (self.mlir_custom,), CUSTOM),
        ):
            for value in values:
                if value not in allowed:
                    known = ", ".join(allowed)
                    raise ConfigError(f"{name}={value!r} is not allowed: use one of {known}")

    @property
    def needs_autograd(self) -> bool:
        """Whether graphs have to go through AOTAutograd."""
        return self.phases != ("fw",) or "mlir" in self.formats

    def keeps(self, number: int, name: str) -> bool:
        """Whether the files of a stage are written."""
        ends = {"before": number == 0, "after": number == AFTER}
        return self.stage in ("all", name) or ends.get(self.stage, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One graph at one point of the pass pipeline."""

    graph: int
    """Which graph of the model; more than one means graph breaks."""
    number: int
    """Position in the pipeline: 0 is the graph as captured, `AFTER` the result."""
    name: str
    """``before``, the name of the pass that has just run, or ``after``."""
    text: str
    """The graph as readable text."""
    phase: str = "fw"
    """One of `PHASES` or `LOWERED`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Further texts, by suffix: py, json, mlir."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Operations by name."""
    view: GraphView | None = None
    """Its picture; only first and last stages have one."""

    @property
    def stem(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.number:02d}_{self.name}"


def make_stage(
    gm: GraphModule,
    options: DumpOptions,
    *,
    graph: int,
    number: int,
    name: str,
    phase: str = "fw",
) -> Stage:
    """Write down one graph in the wanted text formats."""
    annotate_values(gm)
    files = {}
    if "py" in options.formats:
        files["py"] = gm.code
    if "json" in options.formats:
        files["json"] = json.dumps(graph_data(gm), indent=1)
    return Stage(
        graph=graph,
        number=number,
        name=name,
        phase=phase,
        text=readable(gm),
        files=files,
        counts=op_counts(gm),
    )


def count_changes(
    before: Mapping[str, int], after: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Operation -> (count before, count after), where they differ."""
    names = sorted({*before, *after})
    pairs = {name: (before.get(name, 0), after.get(name, 0)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
