"""Pieces of Triton text: a kernel with its argument list, tokens, masks, long calls."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

_WIDTH = 96

ArgumentKind = Literal["stream", "float", "int"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One ``@triton.jit`` kernel as text, with what a caller or a compiler has to know of it."""

    name: str
    comment: str
    """What it computes and what one program owns."""
    streams: tuple[str, ...]
    """Pointer arguments to numbers of the streams' dtype; they come first, in this order."""
    floats: tuple[str, ...] = ()
    """Pointer arguments to float32."""
    integers: tuple[str, ...] = ()
    """Integer arguments."""
    constants: tuple[str, ...] = ()
    """``tl.constexpr`` arguments, given by name: C, tiles, the precision of products."""
    body: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The positional arguments, in order."""
        return self.streams + self.floats + self.integers

    def text(self) -> str:
        """The definition. Integers are not specialised on: a 1 or a 16 is no other kernel."""
        names = [*self.arguments, *(f"{name}: tl.constexpr" for name in self.constants)]
        own = f"do_not_specialize={list(self.integers)}".replace("'", '"')
        return "\n".join(
            (
                f"@triton.jit({own})" if self.integers else "@triton.jit",
                *call(f"def {self.name}", names, after=":"),
                *(f"    # {line}" for line in self.comment.splitlines()),
                *(f"    {line}" if line else "" for line in self.body),
                "",
            )
        )


def function(name: str, arguments: Iterable[str], comment: str, body: Iterable[str]) -> str:
    """A ``@triton.jit`` function that kernels call."""
    head = call(f"def {name}", arguments, after=":")
    return "\n".join(("@triton.jit", *head, f"    # {comment}", *indent(body), ""))


def call(head: str, arguments: Iterable[str], after: str = "") -> Iterator[str]:
    """``head(arguments)after``, over several lines if it is long."""
    arguments = list(arguments)
    line = f"{head}({', '.join(arguments)}){after}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"{head}("
    words = [f"{argument.removesuffix(',')}," for argument in arguments]
    yield from (f"    {line}" for line in _filled(words))
    yield f"){after}"


def numbered(name: str, count: int) -> list[str]:
    """``name0``, ``name1``, and so on."""
    return [f"{name}{i}" for i in range(count)]


def row(i: int, n: int) -> list[int]:
    """Flat indices of row ``i`` of an n x n matrix, row-major."""
    return [i * n + j for j in range(n)]


def column(j: int, n: int) -> list[int]:
    """Flat indices of column ``j`` of an n x n matrix, row-major."""
    return [i * n + j for i in range(n)]


def items(name: str, indices: Iterable[int]) -> list[str]:
    """``name[i]`` for each index."""
    return [f"{name}[{i}]" for i in indices]


def pack(head: str, values: Iterable[str]) -> Iterator[str]:
    """``head (value, value)``, a tuple also of one, over several lines if it is long."""
    values = list(values)
    yield from call(f"{head} ", [f"{values[0]},"] if len(values) == 1 else values)


def largest(terms: list[str]) -> str:
    """The maximum of the terms."""
    return terms[0] if len(terms) == 1 else f"tl.maximum({terms[0]}, {largest(terms[1:])})"


def assign(target: str, terms: Iterable[str]) -> Iterator[str]:
    """``target = the sum of the terms``, over several lines if it is long."""
    terms = list(terms)
    line = f"{target} = {' + '.join(terms)}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"{target} = ("
    rest = [terms[0], *(f"+ {term}" for term in terms[1:])]
    yield from (f"    {line}" for line in _filled(rest))
    yield ")"


def indent(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a loop's body."""
    yield from (f"    {line}" for line in lines)


def loop(head: str, body: Iterable[str]) -> Iterator[str]:
    """``head:`` and its indented body."""
    yield f"{head}:"
    yield from indent(body)


def _filled(words: list[str]) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + len(word) > _WIDTH - 8:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
    yield line
