"""Pieces of C++ text that the emitter and the constraints share."""

from collections.abc import Callable, Iterable, Iterator

UNROLLED = 8
"""Up to so many streams code is written out for each; more would take long to compile."""


def each(n: int, name: str, body: Callable[[str], Iterable[str]]) -> Iterator[str]:
    """``body`` for each of n streams: written out, or in a loop over ``name``."""
    if n <= UNROLLED:
        for i in range(n):
            yield from body(str(i))
    else:
        yield from block(f"for (int {name} = 0; {name} < {n}; ++{name})", body(name))


def entry(i: int | str, j: int | str, n: int) -> str:
    """Flat index of an entry of an n x n matrix, row-major; i and j are numbers or variables."""
    if str(i).isdigit() and str(j).isdigit():
        return str(int(i) * n + int(j))
    return f"{i} * {n} + {j}"


def row(i: int | str, n: int) -> list[str]:
    """Flat indices of row ``i`` of an n x n matrix, row-major."""
    return [entry(i, j, n) for j in range(n)]


def column(j: int | str, n: int) -> list[str]:
    """Flat indices of column ``j`` of an n x n matrix, row-major."""
    return [entry(i, j, n) for i in range(n)]


def items(name: str, indices: Iterable[int | str]) -> list[str]:
    """``name[i]`` for each index."""
    return [f"{name}[{i}]" for i in indices]


def total(terms: Iterable[str]) -> str:
    """The terms added from left to right."""
    return " + ".join(terms)


def largest(terms: list[str]) -> str:
    """The maximum of the terms."""
    return terms[0] if len(terms) == 1 else f"max({terms[0]}, {largest(terms[1:])})"


def literal(value: float) -> str:
    """A float32 constant."""
    return f"{float(value)!r}f"


def block(head: str, body: Iterable[str]) -> Iterator[str]:
    """``head { body }`` with the body indented."""
    yield f"{head} {{"
    yield from (f"  {line}" if line else line for line in body)
    yield "}"


def function(head: str, body: Iterable[str]) -> str:
    """A function that is always inlined, as text."""
    return "\n".join(block(f"INLINE void {head}", body)) + "\n"
