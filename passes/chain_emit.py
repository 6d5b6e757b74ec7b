"""Put mhc ops in the place of recognised sites.

    u, h_post, h_res = pre(X, phi, bias, alpha);   X' = post(X, f, h_post, h_res)

Parameters stay the model's own: `chain_parameters` rearranges them in the graph.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.chain_alone import Alone
from mhc_compile.passes.chain_coefficients import Refused
from mhc_compile.passes.chain_layout import Emitter, canonical, unviewed
from mhc_compile.passes.chain_parameters import Parameters
from mhc_compile.passes.chain_scope import Scope, axes_of
from mhc_compile.passes.chain_sinkhorn import COLUMNS, Step
from mhc_compile.passes.chain_sites import Read, Site, Update
from mhc_compile.passes.chain_values import Atom, Dim
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.values import VALUE_KEYS, dims, dtype_of
from mhc_compile.passes.vocabulary import CAST

_OPS = torch.ops.mhc


@dataclass(frozen=True, slots=True)
class State:
    """The streams of a node of the model as the ops take them."""

    node: Node
    dims: tuple[Dim, ...]
    """Its axes: tokens, one each, then streams, then channels."""
    dtype: torch.dtype | None

    @property
    def narrow(self) -> tuple[Dim, ...]:
        """Axes of one stream."""
        return (*self.dims[:-2], self.dims[-1])


@dataclass(slots=True)
class Rewriter:
    """Rewrites the sites of one graph, in graph order.

    Each method either rewrites, or raises `Refused` and leaves the graph as it was.
    """

    graph: Graph
    kernels: str
    states: dict[Node, State] = field(default_factory=dict)
    """What stands for the states that rewritten sites have made."""

    def rewrite_site(self, site: Site, scope: Scope) -> tuple[Node, int]:
        """Emit pre and post, and let readers of the old branch input and state read theirs.

        Returns:
            What stands for the next state, and the number of new nodes.
        """
        update = site.update
        assert update is not None
        before = Emitter(self.graph, min(site.read.node, update.node), "pre")
        after = Emitter(self.graph, update.node, "post")
        text = replace(site.spec, kernels=self.kernels).encode()
        try:
            state = self._state(before, scope, site.spec.streams)
            dtype = _state_dtype(state.dtype, update)
            streams = before.cast(state.node, state.dtype, dtype)
            parameters = Parameters(before, scope, site.spec.streams, (site.read.node, update.node))
            phi = parameters.phi(site.groups)
            bias, alpha = parameters.bias(site.groups, phi), parameters.alpha(site.groups, phi)
            made = before.call(_OPS.pre.default, streams, phi, bias, alpha, text)
            u, h_post, h_res = (before.call(operator.getitem, made, i) for i in range(3))
            u = before.relayout(u, state.narrow, site.read.value.dims)
            u = before.cast(u, dtype, dtype_of(site.read.node))
            if site.post_factor != 2.0:
                h_post = after.call(torch.mul, h_post, site.post_factor / 2.0)
            if site.post_eps:
                h_post = after.call(torch.add, h_post, site.post_eps)
            if site.transposed:
                h_res = after.call(torch.transpose, h_res, -2, -1)
            if site.rest is not None:
                h_res = _half_step(after, h_res, site.rest)
            branch = self._branch(after, update, state.narrow)
            post = after.call(_OPS.post.default, streams, branch, h_post, h_res, text)
            result = after.relayout(post, state.dims, update.value.dims)
            result = after.cast(result, dtype, dtype_of(update.node))
        except Refused:
            after.drop()
            before.drop()
            raise
        self.states[result] = State(post, state.dims, dtype)
        _replace(site.read.node, u)
        _replace(update.node, result)
        return result, len(before.added) + len(after.added)

    def rewrite_head(self, site: Site, scope: Scope) -> int:
        """Emit a learned collapse; the number of new nodes."""
        emitter = Emitter(self.graph, site.read.node, "collapse")
        text = replace(site.spec, kernels=self.kernels).encode()
        try:
            state = self._state(emitter, scope, site.spec.streams)
            parameters = Parameters(emitter, scope, site.spec.streams, (site.read.node,))
            phi = parameters.phi(site.groups)
            bias, alpha = parameters.bias(site.groups, phi), parameters.alpha(site.groups, phi)
            self._collapse(emitter, site.read, state, phi, bias, alpha, "learned", text)
        except Refused:
            emitter.drop()
            raise
        return len(emitter.added)

    def rewrite_collapse(self, read: Read, scope: Scope, mode: str) -> int:
        """Emit a mean or a sum of the streams; the number of new nodes."""
        streams = len(read.weights)
        emitter = Emitter(self.graph, read.node, "collapse")
        text = SiteSpec(streams=streams, kernels=self.kernels).encode()
        try:
            state = self._state(emitter, scope, streams)
            self._collapse(emitter, read, state, None, None, None, mode, text)
        except Refused:
            emitter.drop()
            raise
        return len(emitter.added)

    def rewrite_expand(self, scope: Scope, narrow: Node, streams: int) -> int:
        """Emit the expand that makes the root from ``narrow`` ``[tokens..., C]``; as above."""
        assert scope.channels is not None
        emitter = Emitter(self.graph, scope.root, "expand")
        made = emitter.call(_OPS.expand.default, narrow, streams, -1)
        wide = canonical([dim for dim in scope.axes if dim], streams, scope.channels)
        tokens = iter(wide)
        lead = [next(tokens) if size != 1 else () for size in dims(narrow)[:-1]]
        wide = (*lead, *tokens)
        new = emitter.relayout(made, wide, scope.axes)
        self.states[scope.root] = State(made, wide, dtype_of(scope.root))
        _replace(scope.root, new)
        return len(emitter.added)

    def _collapse(self, emitter: Emitter, read: Read, state: State, *arguments: object) -> None:
        made = emitter.call(_OPS.collapse.default, state.node, *arguments)
        made = emitter.relayout(made, state.narrow, read.value.dims)
        _replace(read.node, emitter.cast(made, state.dtype, dtype_of(read.node)))

    def _state(self, emitter: Emitter, scope: Scope, streams: int) -> State:
        """The state that a scope starts from."""
        known = self.states.get(scope.root)
        if known is None:
            assert scope.channels is not None
            wide = canonical(scope.axes, streams, scope.channels)
            node = emitter.relayout(scope.root, scope.axes, wide)
            return State(node, wide, dtype_of(scope.root))
        return known

    def _branch(self, emitter: Emitter, update: Update, narrow: Sequence[Dim]) -> Node:
        """The branch output as ``[tokens..., C]``."""
        node = update.branch.args[0]
        assert isinstance(node, Node)
        sizes = [math.prod(atom.size for atom in dim) for dim in narrow]
        found = unviewed(node, sizes)
        if list(dims(found)) == sizes:
            return found
        return emitter.relayout(node, update.branch_dims, narrow)


def _replace(old: Node, new: Node) -> None:
    """Let ``new``, which has the same value, be read in the place of ``old``."""
    new.meta.update({key: old.meta[key] for key in VALUE_KEYS if key in old.meta})
    old.replace_all_uses_with(new)


def _state_dtype(own: torch.dtype | None, update: Update) -> torch.dtype | None:
    """What the streams are kept in: as they come, or wider if the next state stays so."""
    new = dtype_of(update.node)
    back = all(op_name(user) in CAST and dtype_of(user) == own for user in update.node.users)
    return own if back else new


def _half_step(emitter: Emitter, matrix: Node, step: Step) -> Node:
    """One more normalisation of a mixing matrix [out, in], as the source has it."""
    entries = matrix
    if step.entry_eps:
        entries = emitter.call(torch.add, matrix, step.entry_eps)
    axis = -2 if step.axis == COLUMNS else -1
    total = emitter.call(torch.sum, entries if step.sums_entries else matrix, axis, True)
    if step.divisor_eps:
        total = emitter.call(torch.add, total, step.divisor_eps)
    if step.floor:
        total = emitter.call(torch.clamp_min, total, step.floor)
    return emitter.call(torch.div, entries, total)


def rewrite_alone(graph: Graph, alone: Alone, kernels: str) -> int:
    """Emit the one op that a Sinkhorn iteration is; the number of new nodes."""
    emitter = Emitter(graph, alone.node, "sinkhorn")
    logits = alone.logits
    axes = [axis for axis in range(len(dims(logits))) if axis not in (alone.rows, alone.columns)]
    order = [*axes, alone.rows, alone.columns]
    tokens = axes_of(logits, (alone.rows, alone.columns))
    if order != sorted(order):
        logits = emitter.call(torch.permute, logits, tuple(order))
    made = emitter.call(
        _OPS.sinkhorn.default, logits, replace(alone.spec, kernels=kernels).encode()
    )
    # The two axes of the matrix are told apart by a mark.
    have = (*(tokens[axis] for axis in axes), *_MARKS)
    marks = iter(_MARKS[::-1] if alone.is_swapped else _MARKS)
    want = tuple(next(marks) if _is_small(dim) else dim for dim in alone.value.dims)
    _replace(alone.node, emitter.relayout(made, have, want))
    return len(emitter.added)


_MARKS = ((Atom("small", 0, ("row",)),), (Atom("small", 0, ("column",)),))


def _is_small(dim: Dim) -> bool:
    return bool(dim) and dim[0].kind == "small"
