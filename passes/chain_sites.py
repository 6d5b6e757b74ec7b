"""Recognise one hand-written site in what was read from its state.

    u = sum_i h_pre[i] X_i        X'_i = sum_j H_res[i, j] X_j + h_post[i] f

`Reading` collects the weighted sums of the streams while the graph is read; `match_site` and
`match_head` then ask how the weights are made.
"""

from dataclasses import dataclass, field

from torch.fx import Node

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.chain_coefficients import Gate, Logit, Refused, match_gate, match_logit
from mhc_compile.passes.chain_scope import Scope
from mhc_compile.passes.chain_sinkhorn import Matrix, Sinkhorn, Step, find_sinkhorn, transposed
from mhc_compile.passes.chain_terms import VECTOR, Term
from mhc_compile.passes.chain_values import Dim, Value


@dataclass(frozen=True, slots=True)
class Read:
    """A weighted sum of all streams."""

    node: Node
    value: Value
    weights: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """The next state."""

    node: Node
    value: Value
    branch: Term
    """The leaf that is written into every stream."""
    branch_dims: tuple[Dim, ...]
    post: tuple[Term, ...]
    matrix: Matrix
    """Weights [out, in]."""


@dataclass(slots=True)
class Reading:
    """What becomes of a state of ``streams`` streams."""

    scope: Scope
    streams: int
    reads: list[Read] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)

    def stop(self, node: Node, value: Value) -> bool:
        """Take note of reads and updates; what is computed from them is another story."""
        if not value.has_channel:
            return False
        if not value.small:
            weights = self._weights(value.items[0])
            if weights is not None and self._is_read(weights):
                self.reads.append(Read(node, value, weights))
                return True
        if value.small == (self.streams,):
            update = self._update(node, value)
            if update is not None:
                self.updates.append(update)
                return True
        return False

    def _weights(self, vector: Term) -> tuple[Term, ...] | None:
        """The weights of the streams in ``vector``, if it is a sum of all of them and no more."""
        found = {
            key[0].args[1]: weight
            for key, weight in vector.args
            if len(key) == 1 and key[0].args[0] is self.scope.root
        }
        if len(found) != self.streams or len(vector.args) != self.streams:
            return None
        return tuple(found[j] for j in range(self.streams))

    def _is_read(self, weights: tuple[Term, ...]) -> bool:
        if all(weight.op == "const" for weight in weights):
            return len(set(weights)) == 1
        try:
            for weight in weights:
                self.gate(weight)
        except Refused:
            return False
        return True

    def gate(self, term: Term) -> Gate:
        """`match_gate` in this state."""
        assert self.scope.channels is not None
        return match_gate(term, self.scope.root, self.streams, self.scope.channels)

    def logit(self, term: Term) -> Logit:
        """`match_logit` in this state."""
        assert self.scope.channels is not None
        return match_logit(term, self.scope.root, self.streams, self.scope.channels)

    def _update(self, node: Node, value: Value) -> Update | None:
        root, zero = self.scope.root, self.scope.terms.const(0.0)
        rows: list[list[Term]] = []
        post: list[Term] = []
        branches: set[Term] = set()
        for item in value.items:
            if item.op != VECTOR:
                return None
            row = [zero] * self.streams
            others = []
            for key, weight in item.args:
                if len(key) != 1:
                    return None
                if key[0].args[0] is root:
                    row[key[0].args[1]] = weight
                else:
                    others.append((key[0], weight))
            if len(others) != 1 or all(weight is zero for weight in row):
                return None
            branches.add(others[0][0])
            post.append(others[0][1])
            rows.append(row)
        branch = branches.pop()
        # Of a single token nothing tells a branch output from a parameter by its axes.
        is_single = not any(atom.kind == "token" for dim in self.scope.axes for atom in dim)
        if branches or not (branch.args[2] or is_single):
            return None
        return Update(node, value, branch, self.scope.adopted[branch.args[0]], tuple(post), rows)


@dataclass(frozen=True, slots=True)
class Site:
    """A recognised site, or a learned head: what ``mhc::pre`` (or collapse) has to be given."""

    spec: SiteSpec
    read: Read
    groups: tuple[tuple[Logit, ...], ...]
    """Logits of pre, post and res in the order of the op, or of the head alone."""
    update: Update | None = None
    post_factor: float = 2.0
    post_eps: float = 0.0
    transposed: bool = False
    """Whether the op makes the transpose of the mixing matrix."""
    rest: Step | None = None
    """A half iteration on the op's mixing matrix that stays in the graph."""
    iterates: frozenset[Term] = frozenset()
    """Entries of the mixing matrix and of what it is made from step by step."""


def match_site(reading: Reading, update: Update) -> Site:
    """The site that ends in ``update``.

    Raises:
        Refused: no op computes it.
    """
    post = _gates(reading, update.post)
    gated = [read for read in reading.reads if read.weights[0].op != "const"]
    if len(gated) != 1:
        raise Refused(
            "nothing reads its branch input out of the streams with weights an op computes"
            if not gated
            else "several weighted sums read its streams"
        )
    pre = _gates(reading, gated[0].weights)
    if pre[0].factor != 1.0:
        raise Refused("the weights of its branch input are gates of another size than 1")
    found = _mixing(reading, update.matrix, is_bounded=pre[0].logit.is_bounded)
    groups = (tuple(g.logit for g in pre), tuple(g.logit for g in post), found.logits)
    logits = [logit for group in groups for logit in group]
    if any(logit.is_bounded != pre[0].logit.is_bounded for logit in logits):
        raise Refused("some of its coefficients are gates and some are not")
    _check_groups(groups)
    spec = SiteSpec(
        streams=reading.streams,
        constraint=found.constraint,
        iters=found.iters,
        sinkhorn_eps=found.eps,
        eps_at=found.eps_at,
        pre_eps=pre[0].eps,
        norm_eps=logits[0].norm_eps,
    )
    factor = 2.0 if pre[0].logit.is_bounded else post[0].factor
    return Site(
        spec,
        gated[0],
        groups,
        update,
        factor,
        post[0].eps,
        found.transposed,
        found.rest,
        found.iterates,
    )


def match_head(reading: Reading, read: Read) -> Site:
    """The learned collapse that is ``read``.

    Raises:
        Refused: no op computes it.
    """
    gates = _gates(reading, read.weights)
    if gates[0].logit.is_bounded or gates[0].factor != 1.0:
        raise Refused("the weights of its head are no gates of size 1")
    groups = (tuple(gate.logit for gate in gates),)
    _check_groups(groups)
    spec = SiteSpec(streams=reading.streams, pre_eps=gates[0].eps, norm_eps=gates[0].logit.norm_eps)
    return Site(spec, read, groups)


def _gates(reading: Reading, weights: tuple[Term, ...]) -> list[Gate]:
    gates = [reading.gate(weight) for weight in weights]
    if len({(gate.factor, gate.eps) for gate in gates}) != 1:
        raise Refused("its gates differ from stream to stream")
    return gates


def _check_groups(groups: tuple[tuple[Logit, ...], ...]) -> None:
    """Refuse what one norm, and one scale a group, cannot express."""
    if any(logit.stream is not None and not logit.is_bounded for g in groups for logit in g):
        raise Refused("each stream is normed and projected by itself, but gated by a sigmoid")
    if any(logit.stream is None and logit.is_bounded for g in groups for logit in g):
        raise Refused("its bounded coefficients are projected from all streams together")
    if len({logit.norm_eps for group in groups for logit in group}) != 1:
        raise Refused("its coefficients are projected from differently normed states")
    for group in groups:
        if len({logit.scale for logit in group}) > 1:
            raise Refused("its coefficients have a scale each")


@dataclass(frozen=True, slots=True)
class _Mixing:
    constraint: str
    logits: tuple[Logit, ...]
    iters: int = 20
    eps: float = 0.0
    eps_at: str = "divisor"
    transposed: bool = False
    rest: Step | None = None
    iterates: frozenset[Term] = frozenset()


def _mixing(reading: Reading, matrix: Matrix, *, is_bounded: bool) -> _Mixing:
    one, zero = reading.scope.terms.one, reading.scope.terms.const(0.0)
    size = range(len(matrix))
    if all(matrix[i][j] is (one if i == j else zero) for i in size for j in size):
        if is_bounded:
            raise Refused("its streams are not mixed, but its other coefficients are bounded")
        return _Mixing("identity", ())
    if is_bounded:
        return _Mixing("none", _flat([[reading.gate(e).logit for e in row] for row in matrix]))
    found = find_sinkhorn(matrix)
    if isinstance(found, str):
        raise Refused(found)
    entries = transposed(found.logits) if found.transposed else found.logits
    logits = _flat([[reading.logit(entry) for entry in row] for row in entries])
    return _of_sinkhorn(found, logits)


def _of_sinkhorn(found: Sinkhorn, logits: tuple[Logit, ...]) -> _Mixing:
    return _Mixing(
        found.constraint,
        logits,
        found.iters,
        found.eps,
        found.eps_at,
        found.transposed,
        found.rest,
        found.entries,
    )


def _flat(rows: list[list[Logit]]) -> tuple[Logit, ...]:
    return tuple(logit for row in rows for logit in row)
