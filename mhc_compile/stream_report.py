"""What two streams of a device would gain a model, by the estimate and the simulator alone."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from mhc_compile.inspection import LoweredGraph
from mhc_compile.passes.estimate import H100, Device
from mhc_compile.passes.simulate import Timeline
from mhc_compile.passes.stream_program import Hold, Record, Wait
from mhc_compile.passes.streams import StreamPlan, plan_streams


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStreams:
    """The plan of one graph."""

    graph: int
    phase: str
    """``fw`` or ``bw``."""
    plan: StreamPlan

    def count(self, kind: type) -> int:
        """How many instructions of a kind the plan has."""
        return sum(isinstance(step, kind) for step in self.plan.program)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, times in seconds."""
        return {
            "graph": self.graph,
            "phase": self.phase,
            "side": list(self.plan.side),
            "records": self.count(Record),
            "waits": self.count(Wait),
            "holds": self.count(Hold),
            "kept": self.plan.gains,
            "one_stream": _timeline(self.plan.one),
            "two_streams": _timeline(self.plan.two),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReport:
    """The plans of all graphs of a model."""

    model: str
    device: Device
    graphs: tuple[GraphStreams, ...]

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plans as JSON text, keys sorted."""
        content = {
            "model": self.model,
            "device": asdict(self.device),
            "graphs": [graph.to_dict() for graph in self.graphs],
        }
        return json.dumps(content, indent=indent, sort_keys=True)


def stream_report(
    model: str, lowered: Iterable[LoweredGraph], device: Device = H100
) -> StreamReport:
    """Plan two streams for graphs of AOTAutograd, whatever device they were traced on.

    Args:
        model: its name, for the report.
        lowered: what `mhc_compile.inspection.lowered_graphs` has returned.
        device: whose costs to reckon with.
    """
    graphs = tuple(
        GraphStreams(graph=g.graph, phase=g.phase, plan=plan_streams(g.gm.graph, device))
        for g in lowered
    )
    return StreamReport(model=model, device=device, graphs=graphs)


def _timeline(timeline: Timeline) -> dict[str, Any]:
    return {
        "seconds": timeline.makespan,
        "host": timeline.host,
        "spans": [asdict(span) for span in timeline.spans],
    }
