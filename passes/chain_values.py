"""Tensors whose small axes are written out: one `Term` for each entry, the same for every token.

The axes of a value are made of *atoms*: tokens (batch, sequence, space), small axes such as the n
streams or the n * n coefficients, and the channels. Views regroup atoms: ``[B, T, n, C]`` flattened
to ``[B, T, n C]`` has a last axis of two atoms. Only small atoms are enumerated, so a value costs a
few dozen terms however many tokens and channels there are.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mhc_compile.passes.chain_terms import NotExpressible, Term, Terms

Kind = Literal["token", "small", "channel", "any"]


@dataclass(frozen=True, slots=True)
class Atom:
    """A part of an axis that views keep together."""

    kind: Kind
    """"any" is a size-1 axis expanded: it fits whatever it meets."""
    size: Any
    """An int, or an expression for a symbolic number of tokens."""
    origin: tuple[Any, ...] = ()
    """Of tokens: which axis of the state, and how it was split since."""


Dim = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What a node computes."""

    dims: tuple[Dim, ...]
    items: tuple[Term, ...]
    """The entries, row-major over the small atoms in the order of ``dims``."""

    @property
    def small(self) -> tuple[int, ...]:
        """Sizes of the small atoms."""
        return tuple(atom.size for atom in _atoms(self.dims) if atom.kind == "small")

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The shape of the tensor."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def has_channel(self) -> bool:
        """Whether entries are vectors."""
        return any(atom.kind == "channel" for atom in _atoms(self.dims))

    def map(self, function: Callable[[Term], Term]) -> "Value":
        """The value with ``function`` of each entry."""
        return Value(self.dims, tuple(map(function, self.items)))


def small(size: int) -> Dim:
    """An enumerated axis; () if there is nothing to enumerate."""
    return (Atom("small", size),) if size != 1 else ()


def _atoms(dims: Iterable[Dim]) -> list[Atom]:
    return [atom for dim in dims for atom in dim]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def gather(
    items: Sequence[Term], shape: Sequence[int], strides: Sequence[int], offset: int = 0
) -> tuple[Term, ...]:
    """The entries of a strided view of ``items``."""
    indices = _indices(tuple(shape), tuple(strides), offset)
    return tuple([items[i] for i in indices])


@lru_cache(maxsize=4096)  # the same few views come again at every step of every site
def _indices(shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> tuple[int, ...]:
    return tuple(
        offset + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, shape))
    )


def permute(value: Value, order: Sequence[int]) -> Value:
    """The value with axis ``order[i]`` in place i."""
    strides = _dim_strides(value)
    dims = tuple(value.dims[axis] for axis in order)
    shape = [atom.size for atom in _atoms(dims) if atom.kind == "small"]
    moved = [stride for axis in order for stride in strides[axis]]
    return Value(dims, gather(value.items, shape, moved))


def _dim_strides(value: Value) -> list[list[int]]:
    """For each axis the strides of its small atoms."""
    remaining = iter(_strides(value.small))
    return [[next(remaining) for atom in dim if atom.kind == "small"] for dim in value.dims]


def reshape(value: Value, sizes: Sequence[Any]) -> Value:
    """The value with its axes regrouped to ``sizes``.

    Raises:
        NotExpressible: the channels would be torn apart.
    """
    queue = _atoms(value.dims)[::-1]
    dims: list[Dim] = []
    for size in sizes:
        dim: list[Atom] = []
        done: Any = 1
        while done != size:
            if not queue:
                raise NotExpressible("a view that does not fit")
            atom = queue.pop()
            rest = _divide(size, done)
            if _divides(atom.size, rest):
                done = done * atom.size
                dim.append(atom)
                continue
            outer, inner = _split(atom, rest)
            queue.append(inner)
            done = size
            dim.append(outer)
        dims.append(_joined(dim))
    if queue:
        raise NotExpressible("a view that does not fit")
    return Value(tuple(dims), value.items)


def _divide(whole: Any, part: Any) -> Any:
    if isinstance(whole, int) and isinstance(part, int):
        if whole % part:
            raise NotExpressible("a view that splits unevenly")
        return whole // part
    quotient = whole / part
    if getattr(quotient, "as_numer_denom", lambda: (0, 1))()[1] != 1:
        raise NotExpressible("a view that splits a symbolic size")
    return int(quotient) if quotient.is_Integer else quotient


def _divides(part: Any, whole: Any) -> bool:
    try:
        _divide(whole, part)
    except NotExpressible:
        return False
    return True


def _split(atom: Atom, outer: Any) -> tuple[Atom, Atom]:
    """``atom`` as two, the first of size ``outer``."""
    if atom.kind not in ("token", "small"):
        raise NotExpressible("a view that splits the channels")
    inner = _divide(atom.size, outer)
    left = Atom(atom.kind, outer, (*atom.origin, "outer") if atom.kind == "token" else ())
    right = Atom(atom.kind, inner, (*atom.origin, "inner") if atom.kind == "token" else ())
    return left, right


def _joined(dim: Sequence[Atom]) -> Dim:
    """Neighbours that belong together made one."""
    joined: list[Atom] = []
    for atom in dim:
        joined.append(atom)
        while len(joined) > 1:
            one, two = joined[-2:]
            if one.kind == two.kind == "small":
                joined[-2:] = [Atom("small", one.size * two.size)]
            elif (
                one.kind == two.kind == "token"
                and one.origin[-1:] == ("outer",)
                and two.origin[-1:] == ("inner",)
                and one.origin[:-1] == two.origin[:-1]
            ):
                joined[-2:] = [Atom("token", one.size * two.size, one.origin[:-1])]
            else:
                break
    return tuple(joined)


def select(value: Value, axis: int, part: int | slice) -> Value:
    """One index, or a slice, of an enumerated axis; a whole slice of any.

    Raises:
        NotExpressible: a part of the tokens or the channels.
    """
    dim = value.dims[axis]
    size = math.prod(atom.size for atom in dim)
    before, after = value.dims[:axis], value.dims[axis + 1 :]
    if not dim and isinstance(part, int):
        return Value((*before, *after), value.items)
    if isinstance(part, slice) and _is_whole(part, size):
        return value
    if len(dim) != 1 or dim[0].kind != "small":
        raise NotExpressible("a part of the tokens or channels")
    indices = [range(size)[part]] if isinstance(part, int) else list(range(size)[part])
    if not indices:
        raise NotExpressible("an empty slice")
    strides = _dim_strides(value)
    own = strides[axis][0]
    step = (indices[1] - indices[0]) if len(indices) > 1 else 1
    new = small(len(indices))
    dims = (*before, *after) if isinstance(part, int) else (*before, new, *after)
    shape = [a.size for a in _atoms((*before, new, *after)) if a.kind == "small"]
    kept = [s for group in strides[:axis] for s in group]
    kept += [own * step] if new else []
    kept += [s for group in strides[axis + 1 :] for s in group]
    return Value(dims, gather(value.items, shape, kept, own * indices[0]))


def _is_whole(part: slice, size: Any) -> bool:
    ends = part.stop is None or part.stop == size or part.stop == 2**63 - 1
    return part.start in (None, 0) and part.step in (None, 1) and ends


def join(values: Sequence[Value], axis: int) -> Value:
    """Concatenation along an axis that is enumerated, or that holds the channels of each."""
    lead = [permute(value, _to_front(len(value.dims), axis)) for value in values]
    first, rest = lead[0].dims[0], lead[0].dims[1:]
    kinds = {atom.kind for value in lead for atom in value.dims[0]}
    is_enumerated = not kinds - {"small"}
    if any(value.dims[1:] != rest for value in lead) or not (
        is_enumerated
        or (kinds <= {"small", "channel"} and all(value.dims[0] == first for value in lead))
    ):
        raise NotExpressible("a concatenation of different axes")
    if is_enumerated:
        whole = small(sum(math.prod(atom.size for atom in value.dims[0]) for value in lead))
    else:
        whole = (*small(len(lead)), *first)
    joined = Value((whole, *rest), tuple(item for value in lead for item in value.items))
    order = [*list(range(1, axis + 1)), 0, *list(range(axis + 1, len(joined.dims)))]
    return permute(joined, order)


def _to_front(rank: int, axis: int) -> list[int]:
    return [axis, *(i for i in range(rank) if i != axis)]


def expand(value: Value, sizes: Sequence[Any]) -> Value:
    """Axes of size 1 made as large as ``sizes`` (of the result) say."""
    missing = len(sizes) - len(value.dims)
    dims = [*[()] * missing, *value.dims]
    for axis, size in enumerate(sizes):
        if not dims[axis] and size != 1:
            dims[axis] = (Atom("any", size),)
    return Value(tuple(dims), value.items)


def broadcast(a: Value, b: Value) -> tuple[tuple[Dim, ...], tuple[Term, ...], tuple[Term, ...]]:
    """Common axes of two operands, and the entries of both along them.

    Raises:
        NotExpressible: tokens of one would meet other tokens, or channels, of the other.
    """
    rank = max(len(a.dims), len(b.dims))
    left = Value(((),) * (rank - len(a.dims)) + a.dims, a.items)
    right = Value(((),) * (rank - len(b.dims)) + b.dims, b.items)
    dims = tuple(map(_meet, left.dims, right.dims))
    return dims, _spread(left, dims), _spread(right, dims)


def _meet(a: Dim, b: Dim) -> Dim:
    if _is_free(a) or _is_free(b):
        free, other = (a, b) if _is_free(a) else (b, a)
        if free and other and math.prod(atom.size for atom in other) != free[0].size:
            raise NotExpressible("axes that do not fit")
        return other or free
    if a != b:
        raise NotExpressible("an operation across tokens or channels")
    return a


def _is_free(dim: Dim) -> bool:
    return not dim or dim[0].kind == "any"


def _spread(value: Value, dims: tuple[Dim, ...]) -> tuple[Term, ...]:
    strides: list[int] = []
    shape: list[int] = []
    for dim, own, target in zip(value.dims, _dim_strides(value), dims, strict=True):
        sizes = [atom.size for atom in target if atom.kind == "small"]
        shape += sizes
        strides += [0] * len(sizes) if _is_free(dim) else own
    return gather(value.items, shape, strides)


def summed(terms: Terms, value: Value, axes: Sequence[int], keep: bool) -> Value:
    """The sum over ``axes``, enumerated ones or the channels."""
    reduced = reduced_groups(value, axes)
    items = [_sum(terms, group) for group in reduced.groups]
    if any(atom.kind == "channel" for axis in axes for atom in value.dims[axis]):
        items = [terms.inner(item) for item in items]
    return Value(reduced.dims(keep), tuple(items))


def _sum(terms: Terms, group: Sequence[Term]) -> Term:
    if any(term.op == "vector" for term in group):
        total = group[0]
        for term in group[1:]:
            total = terms.add(total, term)
        return total
    return terms.total(group)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The entries that one reduction puts together."""

    groups: tuple[tuple[Term, ...], ...]
    before: tuple[Dim, ...]
    axes: tuple[int, ...]

    def dims(self, keep: bool) -> tuple[Dim, ...]:
        """Axes of the result."""
        return tuple(
            () if axis in self.axes else dim
            for axis, dim in enumerate(self.before)
            if keep or axis not in self.axes
        )


def reduced_groups(value: Value, axes: Sequence[int]) -> Reduced:
    """The entries along ``axes``, for every entry of the other small axes.

    Raises:
        NotExpressible: an axis holds tokens.
    """
    for axis in axes:
        if any(atom.kind in ("token", "any") for atom in value.dims[axis]):
            raise NotExpressible("a sum over tokens")
    rest = [axis for axis in range(len(value.dims)) if axis not in axes]
    moved = permute(value, [*rest, *axes])
    inner = math.prod(
        atom.size for axis in axes for atom in value.dims[axis] if atom.kind == "small"
    )
    groups = tuple(moved.items[i : i + inner] for i in range(0, len(moved.items), inner))
    return Reduced(groups, value.dims, tuple(axes))
