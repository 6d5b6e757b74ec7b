"""Where a trunk crosses the edge of its graph: extra inputs and outputs, and the carry between."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mhc_compile import carry
from mhc_compile._torch_private import Compiled, fake_like, is_dtensor, without_tracing
from mhc_compile.analysis import Analysis
from mhc_compile.errors import UnsupportedGraphError
from mhc_compile.kernels.layout import coefficient_dtype, widened_shape
from mhc_compile.kernels.ops_pre import coefficient_shapes, entry_gates
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.match import sites_of
from mhc_compile.passes.lane import Lane
from mhc_compile.passes.plan import Boundary
from mhc_compile.passes.widen import Departure, Widening
from mhc_compile.site import SiteRecord


@dataclass(slots=True)
class _Arrival:
    """A trunk whose streams may come from another graph."""

    boundary: Boundary
    record: SiteRecord
    spec: SiteSpec
    position: int = -1
    """Index of the visible tensor among the call's arguments."""
    inputs: tuple[Node, ...] = ()
    """The state and, of a single pass, the gates of the site before."""

    def take(self, visible: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``inputs`` for this call: what arrives with ``visible``, or fresh at a trunk's start."""
        found = carry.get(visible, self.boundary.dim)
        if isinstance(found, tuple):
            return found
        if self.record.starts:
            state = torch.ops.mhc.expand(visible, self.spec.streams, self.boundary.dim)
            return (state, entry_gates(state, self.spec)) if self.spec.single_pass else (state,)
        raise UnsupportedGraphError(
            f"the streams were lost before {self.record.key} ({self.record.source}): between the "
            "previous block and this one something made a new tensor, wrote in place or detached "
            "(an eager operation, detach(), a cast). Compile both blocks together, or move the "
            "operation into one of them"
        )


class Borders:
    """The borders of one graph, found before the rewrite and wired after it."""

    def __init__(self, analysis: Analysis, records: Mapping[int, SiteRecord]) -> None:
        self._arrivals: list[_Arrival] = []
        self.departures: list[Departure] = []
        """For the rewrite: trunks whose streams go on in another graph."""
        self._visible = 0
        self._carried: list[int] = []  # tensors of each departing trunk
        plan = analysis.plan
        for trunk, arrival, departure in zip(
            plan.trunks, plan.arrivals, plan.departures, strict=True
        ):
            first, last = records[trunk[0].index], records[trunk[-1].index]
            if arrival is not None and first.follows:
                sites = sites_of(analysis.host_of(trunk[0]))
                assert sites is not None, "a planned site has parameters"
                spec = replace(sites.site(first.key).spec, dim=arrival.dim)
                _refuse_sharded(arrival, first)
                self._arrivals.append(_Arrival(arrival, first, spec))
            elif not first.starts:
                raise UnsupportedGraphError(
                    f"{first.key} ({first.source}) continues a trunk, and in this graph nothing "
                    "leads to the site before it: a graph break cuts the trunk there "
                    "(TORCH_LOGS=graph_breaks shows it), or an add that conversion did not see"
                )
            if departure is not None and last.continues:
                _refuse_sharded(departure, last)
                self.departures.append(Departure(departure, last.ends))

    def arrive(self, graph: Graph) -> dict[Node, Lane]:
        """Add an input for every arriving state; the lanes by the visible input they stand for."""
        lanes = {}
        for number, arrival in enumerate(self._arrivals):
            names = ("state", "gates") if arrival.spec.single_pass else ("state",)
            for name in names:
                last = [node for node in graph.nodes if node.op == "placeholder"][-1]
                with graph.inserting_after(last):
                    node = graph.placeholder(f"mhc_{name}_{number}")
                node._dynamo_source = None
                arrival.inputs += (node,)
            dim, streams = arrival.boundary.dim, arrival.spec.streams
            state, *gates = arrival.inputs
            lanes[arrival.boundary.value] = Lane(state, dim, streams, *gates)
        return lanes

    def is_state(self, placeholder: Node) -> bool:
        """Whether an input of the rewritten graph comes with a state, unknown to Dynamo."""
        return any(placeholder in arrival.inputs for arrival in self._arrivals)

    def example(self, placeholder: Node) -> torch.Tensor:
        """A fake example for an arriving state, with the symbolic sizes of its tensor."""
        arrival = next(arrival for arrival in self._arrivals if placeholder in arrival.inputs)
        visible, spec = arrival.boundary.value.meta["example_value"], arrival.spec
        shape = widened_shape(visible.shape, spec.streams, spec.dim)
        state = fake_like(visible, shape)
        if placeholder is arrival.inputs[0]:
            return state
        # It is made from parameters: it requires grad wherever the state does.
        return fake_like(visible, coefficient_shapes(state, spec)[0], coefficient_dtype(state))

    def leave(self, gm: GraphModule, widening: Widening) -> None:
        """Append the state of every departing trunk to the outputs of the rewritten graph."""
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for arrival in self._arrivals:
            arrival.position = inputs.index(arrival.boundary.value)
        output = gm.graph.output_node()
        visible = output.args[0]
        assert isinstance(visible, tuple | list)
        self._visible = len(visible)
        if self.departures:
            states: list[Node] = []
            for departure in self.departures:
                lane = widening.lanes[departure.boundary.value]
                carried = (lane.node,) if lane.gates is None else (lane.node, lane.gates)
                self._carried.append(len(carried))
                states += carried
            output.args = ((*visible, *states),)
            gm.recompile()

    def wrap(self, compiled: Compiled) -> Compiled:
        """``compiled`` as Dynamo calls it: states fetched before, hung on their tensors after."""
        if not self._arrivals and not self.departures:
            return compiled

        @without_tracing
        def call(*args: Any) -> Any:
            taken = [arrival.take(args[arrival.position]) for arrival in self._arrivals]
            outputs = compiled(*args, *itertools.chain(*taken))
            states = iter(outputs[self._visible :])
            for count, departure in zip(self._carried, self.departures, strict=True):
                boundary = departure.boundary
                carried = tuple(itertools.islice(states, count))
                carry.put(outputs[boundary.position], carried, boundary.dim)
            return tuple(outputs[: self._visible])

        return call


def _refuse_sharded(boundary: Boundary, record: SiteRecord) -> None:
    if is_dtensor(boundary.value.meta.get("example_value")):
        raise UnsupportedGraphError(
            f"the trunk goes from graph to graph at {record.key} ({record.source}) as a DTensor, "
            "which cannot carry its streams: compile the whole model at once, or let the plan "
            "give plain tensors to the trunk (use_local_output=True)"
        )
