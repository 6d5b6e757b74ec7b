"""Widen planned trunks to n residual streams.

    x + f(x)   ->   u, h_post, h_res = pre(X);   X' = post(X, f(u), h_post, h_res)
                    with X = expand(x) at the entry of a trunk and collapse(X') for every reader

Paper: arXiv 2512.24880, equations (3) and (14)-(19).
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.lane import Lane
from mhc_compile.passes.lanes import emit_lane
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.plan import Boundary, Plan, PlannedSite
from mhc_compile.passes.values import dims, dtype_of, meta_of_part
from mhc_compile.passes.vocabulary import SHAPE_ONLY


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """The nodes that hold the parameters of one site, and its specification."""

    name: str
    spec: SiteSpec
    bias: Node
    phi: Node | None = None
    alpha: Node | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """How a trunk is collapsed at its end: "mean", "sum", or "learned" with its parameters."""

    mode: str = "mean"
    inputs: SiteInputs | None = None


@dataclass(frozen=True, slots=True)
class Departure:
    """A trunk whose streams go on in another graph."""

    boundary: Boundary
    is_end: bool
    """Whether some use of its last site is the end of the trunk, where users see its value."""


@dataclass(slots=True)
class Widening:
    """Everything the rewrite needs beside the graph, and what it leaves for its caller."""

    plan: Plan
    inputs: Mapping[int, SiteInputs]
    """Site index -> parameters."""
    heads: Mapping[int, Head] = field(default_factory=dict)
    """Trunk -> how it ends; the mean where a trunk is missing. Single-pass sites need none."""
    arriving: Mapping[Node, Lane] = field(default_factory=dict)
    """Values whose streams come from another graph: no expand there."""
    departing: Sequence["Departure"] = ()
    """Trunks whose streams go on in another graph."""
    middle: str = "mean"
    """How readers in the middle of a trunk see it: "mean" or "sum"."""
    lanes: dict[Node, Lane] = field(default_factory=dict)
    """Result: the n-stream twin of every value on a trunk."""


def widen_trunks_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, widening: Widening
) -> PassResult:
    """Carry out ``widening.plan`` on ``gm``, in place.

    Postcondition: each trunk has one expand (or arriving state), a pre and a post per site, and a
    collapse for every value of it that is read outside its branches. A trunk of single-pass sites
    is read there as the next site reads it, by the weights of the last one.
    """
    del example_inputs
    if not widening.plan.sites:
        return PassResult(gm, False)
    _Widener(gm.graph, widening).run()
    return PassResult(gm, True)


class _Widener:
    def __init__(self, graph: Graph, widening: Widening) -> None:
        self.graph = graph
        self.widening = widening
        self.lanes = widening.lanes
        # Values that now live in a lane, operands before their readers, each with its site's spec.
        self.replaced: dict[Node, SiteSpec] = {}
        self.reads: dict[Node, Node] = {}  # what single-pass sites read where they start
        inputs = list(graph.find_nodes(op="placeholder"))
        self.last_input = inputs[-1] if inputs else next(iter(graph.nodes))
        self.heads = {
            trunk[-1].site.root: widening.heads[trunk[-1].trunk]
            for trunk in widening.plan.trunks
            if trunk[-1].trunk in widening.heads
        }

    def run(self) -> None:
        for planned in self.widening.plan.sites:
            self._widen(planned)
        plan = self.widening.plan
        for departure in self.widening.departing:
            trunk = plan.trunks[plan.departures.index(departure.boundary)]
            spec = self.widening.inputs[trunk[-1].index].spec
            for node in departure.boundary.region:
                # At an exit the plain operations stay as well: they act on the collapsed value.
                self._lift(node, spec, replace=not departure.is_end)
        gone = set(self.replaced)
        for value in self.replaced:
            self._serve_readers(value, gone)
        for value in reversed(list(self.replaced)):
            if not value.users:
                self.graph.erase_node(value)

    def _widen(self, planned: PlannedSite) -> None:
        site = planned.site
        inputs = self.widening.inputs[planned.index]
        if planned.is_entry:
            self._enter(planned, inputs)
        for node in planned.region:
            self._lift(node, inputs.spec)
        state = self.lanes[planned.start]
        u, h_post, h_res = self._pre(planned, inputs, state)
        for reader in list(planned.start.users):
            if reader in planned.branch or (planned.branch and _reads_shape_only(reader)):
                reader.replace_input_with(planned.start, u)
        if not u.users:  # a projected skip: the branch reads the collapsed value
            self.graph.erase_node(u)
        elif inputs.spec.single_pass:
            self.reads[planned.start] = u
        for node in reversed(site.skip_path if planned.start is site.origin else ()):
            self._lift(node, inputs.spec)
        self._post(planned, inputs, h_post, h_res)

    def _enter(self, planned: PlannedSite, inputs: SiteInputs) -> None:
        origin = planned.start
        arriving = self.widening.arriving.get(origin)
        if arriving is not None:
            self.lanes[origin] = arriving
            return
        with self.graph.inserting_after(self._behind(origin)):
            arguments = (origin, inputs.spec.streams, planned.dim)
            node = self._call(torch.ops.mhc.expand.default, arguments, f"{origin.name}_streams")
        _describe(node, planned.site.root, inputs.name)
        self.lanes[origin] = Lane(node, planned.dim, inputs.spec.streams)

    def _lift(self, node: Node, spec: SiteSpec, *, replace: bool = True) -> None:
        if node not in self.lanes:
            self.lanes[node] = emit_lane(self.graph, node, self.lanes)
            if replace:
                self.replaced[node] = spec

    def _pre(
        self, planned: PlannedSite, inputs: SiteInputs, state: Lane
    ) -> tuple[Node, Node, Node]:
        root = planned.site.root
        with self.graph.inserting_after(self._behind(state.node)):
            given = () if state.gates is None else (state.gates,)
            parameters = (inputs.phi, inputs.bias, inputs.alpha)
            arguments = (state.node, *parameters, inputs.spec.encode(), *given)
            pre = self._call(torch.ops.mhc.pre.default, arguments, "pre")
        _describe(pre, root, inputs.name)
        parts = []
        last = pre
        for position, name in enumerate(("u", "h_post", "h_res")):
            with self.graph.inserting_after(last):
                last = self._call(operator.getitem, (pre, position), name)
            _describe(last, root, inputs.name)
            parts.append(last)
        return parts[0], parts[1], parts[2]

    def _post(self, planned: PlannedSite, inputs: SiteInputs, h_post: Node, h_res: Node) -> None:
        site, graph = planned.site, self.graph
        skip, dtype = self.lanes[site.skip], dtype_of(site.root)
        new = site.root.prev
        with graph.inserting_before(site.root):
            state = skip.node
            if dtype != dtype_of(site.skip):  # the sum promotes
                state = graph.call_method("to", (state, dtype))
            branch = self._sum(site.branches, dtype)
            if dims(site.root) not in [dims(leaf) for leaf in site.branches]:  # one per channel ...
                first = graph.call_function(torch.select, (skip.node, skip.dim - 1, 0))
                branch = graph.call_function(torch.broadcast_tensors, (branch, first))
                branch = graph.call_function(operator.getitem, (branch, 0))
            arguments = (state, branch, h_post, h_res, inputs.spec.encode())
            post = self._call(torch.ops.mhc.post.default, arguments, f"{site.root.name}_streams")
        while (new := new.next) is not site.root:
            _describe(new, site.root, inputs.name)
        gates = h_post if inputs.spec.single_pass else None
        self.lanes[site.root] = Lane(post, skip.dim, skip.streams, gates)
        # Operands first.
        self.replaced |= dict.fromkeys((*reversed(site.inner), site.root), inputs.spec)

    def _sum(self, branches: Sequence[Node], dtype: torch.dtype | None) -> Node:
        """The sum of all branches: in the dtype of the whole sum, for their order may change."""
        if len(branches) == 1:
            return branches[0]
        terms = [
            leaf if dtype_of(leaf) == dtype else self.graph.call_method("to", (leaf, dtype))
            for leaf in branches
        ]
        return functools.reduce(
            lambda left, right: self.graph.call_function(operator.add, (left, right)), terms
        )

    def _serve_readers(self, value: Node, gone: set[Node]) -> None:
        """Give every remaining reader of a trunk value its collapse."""
        lane = self.lanes.get(value)
        readers = [user for user in value.users if user not in gone]
        if lane is None or not readers:
            return
        if self.replaced[value].single_pass:
            collapsed = self._read(value, lane)
        else:
            collapsed = self._collapse(value, lane)
        for reader in readers:
            reader.replace_input_with(value, collapsed)

    def _read(self, value: Node, lane: Lane) -> Node:
        """What the next single-pass site reads there, or would."""
        if value in self.reads:
            return self.reads[value]
        spec = replace(self.replaced[value], dim=lane.dim)
        with self.graph.inserting_after(lane.node):
            arguments = (lane.node, lane.gates, spec.encode())
            node = self._call(torch.ops.mhc.read.default, arguments, f"{value.name}_collapsed")
        _describe(node, value, "collapse")
        return node

    def _collapse(self, value: Node, lane: Lane) -> Node:
        head = self.heads.get(value, Head(self.widening.middle))
        weights = head.inputs
        args = (weights.phi, weights.bias, weights.alpha) if weights else (None, None, None)
        spec = weights.spec if weights else SiteSpec(streams=lane.streams, dim=lane.dim)
        with self.graph.inserting_after(lane.node):
            arguments = (lane.node, *args, head.mode, spec.encode())
            node = self._call(torch.ops.mhc.collapse.default, arguments, f"{value.name}_collapsed")
        _describe(node, value, "collapse")
        return node

    def _behind(self, node: Node) -> Node:
        """Where new nodes that read ``node`` go: inputs stay together."""
        return self.last_input if node.op == "placeholder" else node

    def _call(self, target: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Node:
        return self.graph.create_node("call_function", target, arguments, name=name)


def _reads_shape_only(node: Node) -> bool:
    """Whether a reader sees sizes and kinds but no values: any tensor of the shape will do."""
    return op_name(node) in SHAPE_ONLY


def _describe(node: Node, origin: Node, name: str) -> None:
    """Source line, owner and recompute tags of a new node: those of the operation it stands for."""
    node.meta = meta_of_part(origin)
    node.meta["custom"] = {**origin.meta.get("custom", {}), "mhc": name}
