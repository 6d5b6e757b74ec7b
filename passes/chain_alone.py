"""Recognise a Sinkhorn iteration whose site is none that an op computes as a whole.

Only one that makes a mixing matrix: n * n coefficients of one token, which multiply streams. The
plan between points of optimal transport, and attention that is normalised both ways, have entries
made from two tokens each and stay what they are.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import permutations

from torch.fx import Node

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.chain_candidates import is_stream_count
from mhc_compile.passes.chain_ops import argument, read
from mhc_compile.passes.chain_reading import read_onward
from mhc_compile.passes.chain_scope import Scope, axes_of
from mhc_compile.passes.chain_sinkhorn import Matrix, Sinkhorn, find_sinkhorn
from mhc_compile.passes.chain_terms import Term
from mhc_compile.passes.chain_values import Value
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims, is_float_tensor, is_state, numel
from mhc_compile.passes.vocabulary import ACTIVATION, CAST, LAYOUT, MATMUL

_STARTS = frozenset({"exp", "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp"})
_POINTWISE = ACTIVATION | LAYOUT | CAST | frozenset({
    "add", "sub", "mul", "div", "neg", "getitem", "split", "split_with_sizes", "chunk", "select",
    "slice", "narrow", "unbind", "detach", "cat", "stack", "amax", "sum", "mean", "square", "pow",
    "sqrt", "rsqrt",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alone:
    """A Sinkhorn iteration from ``logits`` to ``node``."""

    logits: Node
    rows: int
    """Axis of ``logits`` that is the first of the op's matrix; the other is the second."""
    columns: int
    node: Node
    value: Value
    found: Sinkhorn
    is_swapped: bool
    """Whether the op's first axis is the second of the two in ``node``."""

    @property
    def spec(self) -> SiteSpec:
        """What the op has to be told."""
        return SiteSpec(
            streams=dims(self.logits)[self.rows],
            constraint=self.found.constraint,
            iters=self.found.iters,
            sinkhorn_eps=self.found.eps,
            eps_at=self.found.eps_at,
        )


def find_alone(node: Node, skip: Collection[Node]) -> Alone | str | None:
    """The iteration that starts with ``node``; a reason, if it is one that no op computes.

    Args:
        node: any node.
        skip: nodes that are not read.
    """
    logits = first_input(node)
    if op_name(node) not in _STARTS or logits is None or not is_float_tensor(logits):
        return None
    roots = [logits]
    if op_name(logits) == "sub" and (source := first_input(logits)) is not None:
        roots.insert(0, source)  # from before a maximum was taken out
    places = [(root, pair) for root in roots for pair in _pairs(node, root)]
    for start, (rows, columns) in places:
        scope = Scope(start, axes_of(start, (rows, columns)), None, read)
        read_onward(scope, lambda _, __: False, skip)
        found = _longest(scope, rows, columns)
        if found is None:
            continue
        if not _is_mixing(found.node) or not _is_coefficient(start):
            return None
        if len(found.node.users) > 1 or not is_private(scope, found.found.entries, (found.node,)):
            return "its mixing matrix is read elsewhere too"
        return found
    return None


def _pairs(node: Node, logits: Node) -> Iterator[tuple[int, int]]:
    """Axes that may be those of the matrix, the first one being summed over first."""
    sizes = dims(logits)
    axis = argument(node, 1, "dim")
    given = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    for one, two in permutations(range(len(sizes)), 2):
        if sizes[one] != sizes[two] or not is_stream_count(sizes[one]):
            continue
        if not isinstance(given, int) or given % len(sizes) == one:
            yield one, two


def _longest(scope: Scope, rows: int, columns: int) -> Alone | None:
    """The last matrix with an even number of steps behind it, its first sums over ``rows``."""
    n = dims(scope.root)[rows]
    for node, value in reversed(scope.values.items()):
        if not isinstance(value, Value) or value.small != (n, n) or node is scope.root:
            continue
        if value.items[0].op != "quot":
            continue
        grid: Matrix = [value.items[i * n : (i + 1) * n] for i in range(n)]
        for is_swapped, matrix in ((False, grid), (True, list(zip(*grid, strict=True)))):
            found = find_sinkhorn(matrix)
            if isinstance(found, str) or found.rest is not None or found.transposed:
                continue
            first, second = (rows, columns) if rows < columns else (columns, rows)
            place = {first: n, second: 1}
            entries = [leaf for row in found.logits for leaf in row]
            wanted = [i * place[rows] + j * place[columns] for i in range(n) for j in range(n)]
            if all(e.op == "leaf" and e.args[0] is scope.root for e in entries) and wanted == [
                e.args[1] for e in entries
            ]:
                return Alone(scope.root, rows, columns, node, value, found, is_swapped)
    return None


def is_private(scope: Scope, entries: frozenset[Term], replaced: Collection[Node]) -> bool:
    """Whether the numbers ``entries`` are read by nothing that stays once ``replaced`` are gone."""
    gone = set(replaced)
    last = max(replaced)
    for node in sorted(scope.values, reverse=True):
        if node > last or node in gone:
            continue
        if all(user in gone for user in node.users):
            gone.add(node)
            continue
        known = scope.values[node]
        if isinstance(known, Value) and not entries.isdisjoint(known.items):
            return False
    return True


def _is_mixing(node: Node) -> bool:
    """Whether the matrix multiplies a tensor of more axes, or a matrix product takes it."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            name = op_name(user)
            if name in MATMUL:
                return True
            if name == "mul" and any(
                isinstance(arg, Node) and len(dims(arg)) and _is_broadcast(arg, user)
                for arg in user.args
            ):
                return True
            if name in LAYOUT | CAST | {"getitem", "cat", "expand"} and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _is_broadcast(argument: Node, product: Node) -> bool:
    """Whether an operand of a product is broadcast."""
    return dims(argument) != dims(product)


def _is_coefficient(logits: Node) -> bool:
    """Whether each token's logits are made from that token: parameters, inputs, projections."""
    stack, seen = [logits], {logits}
    while stack:
        node = stack.pop()
        name = op_name(node)
        if _is_parameter(node) or node.op == "placeholder":
            continue
        if name in MATMUL and _is_projection(node):
            continue
        if name not in _POINTWISE or _is_outer(node):
            return False
        above = [source for source in node.all_input_nodes if source not in seen]
        seen.update(above)
        stack += above
    return True


def _is_outer(node: Node) -> bool:
    """Whether an operation pairs every entry of one operand with every entry of another."""
    sizes = [numel(source) for source in node.all_input_nodes if is_float_tensor(source)]
    return (
        op_name(node) not in ("cat", "stack")
        and len(sizes) > 1
        and numel(node)
        not in (
            *sizes,
            1,
        )
    )


def _is_projection(node: Node) -> bool:
    """Whether a product is with a weight: a parameter, or something without token axes."""
    operands = [arg for arg in node.all_input_nodes if is_float_tensor(arg)]
    ranks = sorted(len(dims(arg)) for arg in operands)
    return any(map(_is_parameter, operands)) or ranks[0] <= 2 < ranks[-1]


def _is_parameter(node: Node) -> bool:
    """Whether ``node`` is a parameter, or made from parameters alone."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if is_state(current):
            continue
        if current.op not in ("call_function", "call_method") or not current.all_input_nodes:
            return False
        above = [source for source in current.all_input_nodes if source not in seen]
        seen.update(above)
        stack += above
    return True
