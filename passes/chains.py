"""Replace hand-written hyper-connections by mhc ops.

    norm, projection, gates, Sinkhorn, weighted sums  ->  u, h_post, h_res, _ = pre(X, ...)
    H_res X + h_post f                                ->  X' = post(X, f, h_post, h_res)

Recognised by algebra and data flow alone (`chain_terms`, `chain_ops`): names of modules, functions
and parameters mean nothing, and any spelling of the same numbers will do. What no op computes
exactly stays as it is, with its reason; a Sinkhorn iteration in it may still become one op.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.passes.aliases import AliasIndex
from mhc_compile.passes.annotate import annotate_values
from mhc_compile.passes.chain_alone import find_alone, is_private
from mhc_compile.passes.chain_candidates import candidate_states
from mhc_compile.passes.chain_coefficients import Refused, is_static
from mhc_compile.passes.chain_emit import Rewriter, rewrite_alone
from mhc_compile.passes.chain_expand import repeated_tensor
from mhc_compile.passes.chain_ops import read
from mhc_compile.passes.chain_reading import read_onward, without_gradient
from mhc_compile.passes.chain_scope import Scope, axes_of
from mhc_compile.passes.chain_sites import Reading, match_head, match_site
from mhc_compile.passes.chain_values import Dim
from mhc_compile.passes.opnames import is_in_place, op_name
from mhc_compile.passes.values import dims, source_line
from mhc_compile.passes.vocabulary import MATMUL


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """One recognised piece of hand-written hyper-connections, or one that stays."""

    kind: str
    """"site", "collapse", "expand" or "sinkhorn"."""
    source: str
    """``file.py:123`` of the value that the piece ends in."""
    what: str = ""
    """How it is made: `SiteSpec.encode`, or the mode of a collapse. Empty if it stays."""
    before: int = 0
    """Operations it took, of those that are gone now."""
    after: int = 0
    """Operations in their place."""
    reason: str = ""
    """Why it stays; empty otherwise."""


def rewrite_chains_pass(
    gm: GraphModule, example_inputs: Sequence[Any], *, kernels: str, found: list[Chain]
) -> PassResult:
    """Rewrite what is recognised in ``gm``, in place.

    Args:
        gm: a canonical graph.
        example_inputs: not used.
        kernels: `SiteSpec.kernels` of the new ops.
        found: result; what was recognised is added to it, in graph order.
    """
    del example_inputs
    finder = _Finder(gm.graph, kernels, found)
    finder.run()
    if finder.modified:
        annotate_values(gm)
    return PassResult(gm, finder.modified)


class _Finder:
    def __init__(self, graph: Graph, kernels: str, found: list[Chain]) -> None:
        self.graph = graph
        self.kernels = kernels
        self.found = found
        self.rewriter = Rewriter(graph, kernels)
        self.tried: set[tuple[Node, int, int]] = set()
        self.modified = False
        self.aliases = AliasIndex(graph)
        self.skip: set[Node] = set()
        """Nodes that are not read."""
        self.beyond: set[Node] = set()
        """These, and where a Sinkhorn iteration ends: in a product with another tensor."""

    def run(self) -> None:
        products = {
            node
            for node in self.graph.nodes
            if op_name(node) in MATMUL and len(node.all_input_nodes) > 1
        }
        # What is computed with gradients, then what without: an op is one or the other as a whole.
        without = without_gradient(self.graph)
        rest = set(self.graph.nodes) - without
        for self.skip in (without, rest) if without else (without,):
            self.beyond = self.skip | products
            self.tried.clear()
            for look in (self._try_states, self._try_alone):
                for node in list(self.graph.nodes):
                    if not node._erased:
                        look(node)

    def _try_states(self, node: Node) -> None:
        for state in candidate_states(node):
            if state not in self.tried and not state[0]._erased:
                self.tried.add(state)
                self._follow(*state)

    def _follow(self, root: Node, stream: int, channel: int) -> None:
        """Rewrite the sites that start from a state, one behind the other."""
        sizes = dims(root)
        streams, channels = sizes[stream], sizes[channel]
        axes = axes_of(root, (stream,), channel)
        reading = self._reading(root, axes, streams, channels)
        following = self._rewrite_site(reading, (stream, channel))
        if following is not None or not reading.updates:
            self._rewrite_heads(reading, is_hyper=following is not None)
        while following is not None:
            reading = self._reading(*following, streams, channels)
            following = self._rewrite_site(reading, None)
            self._rewrite_heads(reading, is_hyper=True)

    def _reading(self, root: Node, axes: tuple[Dim, ...], streams: int, channels: int) -> Reading:
        reading = Reading(Scope(root, axes, channels, read), streams)
        read_onward(reading.scope, reading.stop, self.skip)
        return reading

    def _rewrite_site(
        self, reading: Reading, entry: tuple[int, int] | None
    ) -> tuple[Node, tuple[Dim, ...]] | None:
        """Rewrite the site that reads a state; the next state, if that was possible.

        Args:
            reading: of the state.
            entry: axes of streams and channels of a state that no recognised site made.
        """
        if not reading.updates:
            return None
        update = reading.updates[0]
        root = reading.scope.root
        try:
            if any(map(self.aliases.is_written, (root, update.branch.args[0]))):
                raise Refused("its state or branch output is written in place")
            site = match_site(reading, update)
            if not is_private(reading.scope, site.iterates, (site.read.node, update.node)):
                raise Refused("its mixing matrix is read elsewhere too")
            if entry is not None:
                narrow = repeated_tensor(root, *entry, reading.streams)
                if narrow is not None:
                    added = self.rewriter.rewrite_expand(reading.scope, narrow, reading.streams)
                    self._note("expand", root, f"n={reading.streams}", added)
            result, added = self.rewriter.rewrite_site(site, reading.scope)
        except Refused as refused:
            if not all(map(is_static, update.post)):
                self._leave("site", update.node, str(refused))
            return None
        reading.reads.remove(site.read)
        self._note("site", update.node, site.spec.encode(), added, site.read.node)
        return result, update.value.dims

    def _rewrite_heads(self, reading: Reading, *, is_hyper: bool) -> None:
        """Rewrite the collapses of a state; plain ones only where it is known to be one."""
        for weighted in reading.reads:
            weight = weighted.weights[0]
            try:
                if weight.op != "const":
                    site = match_head(reading, weighted)
                    what = site.spec.encode()
                    added = self.rewriter.rewrite_head(site, reading.scope)
                elif is_hyper and (mode := _mode(weight.args[0], reading.streams)) is not None:
                    what = mode
                    added = self.rewriter.rewrite_collapse(weighted, reading.scope, mode)
                else:
                    continue
            except Refused as refused:
                self._leave("collapse", weighted.node, str(refused))
                continue
            self._note("collapse", weighted.node, what, added)

    def _try_alone(self, node: Node) -> None:
        alone = find_alone(node, self.beyond)
        if isinstance(alone, str):
            self._leave("sinkhorn", node, alone)
        elif alone is not None:
            added = rewrite_alone(self.graph, alone, self.kernels)
            self._note("sinkhorn", alone.node, alone.spec.encode(), added)

    def _note(self, kind: str, node: Node, what: str, added: int, *others: Node) -> None:
        self.modified = True
        source = source_line(node)
        before = sum(sweep(self.graph, old) for old in (node, *others))
        self.found.append(Chain(kind=kind, source=source, what=what, before=before, after=added))

    def _leave(self, kind: str, node: Node, reason: str) -> None:
        self.found.append(Chain(kind=kind, source=source_line(node), reason=reason))


def _mode(weight: float, streams: int) -> str | None:
    """The plain collapse with this weight for every stream."""
    if math.isclose(weight, 1.0 / streams, rel_tol=1e-9):
        return "mean"
    return "sum" if weight == 1.0 else None


def sweep(graph: Graph, node: Node) -> int:
    """Erase a node that nobody reads, and what was computed for it alone.

    Returns:
        How many nodes that were.
    """
    erased = 0
    stack = [node]
    while stack:
        dead = stack.pop()
        if dead._erased or dead.users or dead.op not in ("call_function", "call_method"):
            continue
        if dead.is_impure() or is_in_place(dead):
            continue
        stack += dead.all_input_nodes
        graph.erase_node(dead)
        erased += 1
    return erased
