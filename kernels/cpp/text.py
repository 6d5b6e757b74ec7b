"""Pieces of C++ text that the emitter and the constraints share."""

from collections.abc import Iterable, Iterator


def row(i: int, n: int) -> list[int]:
    """Flat indices of row ``i`` of an n x n matrix, row-major."""
    return [i * n + j for j in range(n)]


def column(j: int, n: int) -> list[int]:
    """Flat indices of column ``j`` of an n x n matrix, row-major."""
    return [i * n + j for i in range(n)]


def items(name: str, indices: Iterable[int]) -> list[str]:
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
