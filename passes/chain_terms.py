"""What one token's coefficients are computed as: expressions, one object for each distinct one.

Two spellings of the same number give the same `Term`: ``x / s`` and ``x * (1 / s)``, a difference
of logarithms and a quotient, a loop of additions and a ``sum``. Matching is then comparing objects.

A *vector* term is a sum of ``coefficient * (product of C-vectors)``; vectors are the streams of a
state, a branch output, rows of a weight. Summing one over its channels gives a number again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

VECTOR = "vector"


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """An expression. Two equal expressions of one `Terms` are one object."""

    op: str
    args: tuple[Any, ...]
    number: int
    """Order of creation."""

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))})"


class NotExpressible(Exception):  # noqa: N818 - a signal between passes, no error of the user's
    """An operation has no meaning in terms of numbers per token."""


class Terms:
    """Makes terms; arguments may be terms, numbers and anything hashable."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Term] = {}
        self.one = self.const(1.0)

    def make(self, op: str, *args: Any) -> Term:
        """The term ``op(args)`` as it stands, without simplification."""
        key = (op, *args)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Term(op, args, len(self._known))
        return known

    def const(self, value: float) -> Term:
        """A number of the source code."""
        return self.make("const", float(value))

    # Sums. "total" is flat and sorted; "shift" adds a constant and stays apart, so that an eps
    # added to each entry of a row is still seen in the sum of the row.

    def add(self, a: Term, b: Term) -> Term:
        """``a + b``."""
        if a.op == VECTOR or b.op == VECTOR:
            return self._add_vectors(a, b)
        if b.op == "const":
            a, b = b, a
        if a.op == "const":
            if b.op == "const":
                return self.const(a.args[0] + b.args[0])
            return b if a.args[0] == 0.0 else self.make("shift", b, a.args[0])
        for number, other in ((a, b), (b, a)):
            if number.op == "log" and (raised := self._raised(number.args[0], other)):
                return self.log(self.total(map(self.exp, raised)))
        return self.total((a, b))

    def _raised(self, total: Term, by: Term) -> list[Term]:
        """The x of a sum of ``exp(x - by)``, of which ``log(sum) + by`` is the logarithm."""
        members = total.args if total.op == "total" else (total,)
        differences = [term.args[0] for term in members if term.op == "exp"]
        found = [d.args[0] for d in differences if d.op == "sub" and d.args[1] is by]
        return found if len(found) == len(members) else []

    def total(self, terms: Iterable[Term]) -> Term:
        """The sum of ``terms``, which are numbers."""
        members: list[Term] = []
        constant = 0.0
        for term in terms:
            if term.op == "const":
                constant += term.args[0]
            elif term.op == "total":
                members += term.args
            else:
                members.append(term)
        if not members:
            return self.const(constant)
        members.sort(key=lambda term: term.number)
        flat = members[0] if len(members) == 1 else self.make("total", *members)
        return flat if constant == 0.0 else self.make("shift", flat, constant)

    def sub(self, a: Term, b: Term) -> Term:
        """``a - b``."""
        if b.op == "const" or VECTOR in (a.op, b.op):
            return self.add(a, self.scale(-1.0, b))
        return self.const(0.0) if a is b else self.make("sub", a, b)

    # Products and quotients: constants outside, one quotient a level.

    def scale(self, factor: float, a: Term) -> Term:
        """``factor * a``."""
        if a.op == VECTOR:
            return self.vector({key: self.scale(factor, c) for key, c in a.args})
        if a.op == "const":
            return self.const(factor * a.args[0])
        if a.op == "scale":
            factor, a = factor * a.args[0], a.args[1]
        # n * (1 / n) need not round to 1.
        return a if math.isclose(factor, 1.0, rel_tol=1e-12) else self.make("scale", factor, a)

    def mul(self, a: Term, b: Term) -> Term:
        """``a * b``."""
        if a.op == VECTOR or b.op == VECTOR:
            return self._mul_vectors(a, b)
        if b.op in ("const", "scale"):
            a, b = b, a
        if a.op == "const":
            return self.scale(a.args[0], b)
        if a.op == "scale":
            return self.scale(a.args[0], self.mul(a.args[1], b))
        for x, y in ((a, b), (b, a)):
            if y.op == "quot" and y.args[0] is self.one:
                return self.quot(x, y.args[1])
        first, second = sorted((a, b), key=lambda term: term.number)
        return self.make("mul", first, second)

    def quot(self, a: Term, b: Term) -> Term:
        """``a / b``."""
        if b.op == VECTOR:
            raise NotExpressible("a division by a vector")
        if b.op == "const":
            if b.args[0] == 0.0:
                raise NotExpressible("a division by zero")
            return self.scale(1.0 / b.args[0], a)
        if a.op == VECTOR:
            return self.vector({key: self.quot(c, b) for key, c in a.args})
        if b.op == "scale":
            return self.scale(1.0 / b.args[0], self.quot(a, b.args[1]))
        if a.op == "scale":
            return self.scale(a.args[0], self.quot(a.args[1], b))
        if a.op == "const" and a is not self.one:
            return self.scale(a.args[0], self.quot(self.one, b))
        return self.one if a is b else self.make("quot", a, b)

    # Functions of one number.

    def exp(self, a: Term) -> Term:
        """``exp(a)``; a difference from a logarithm is a quotient."""
        a = self._number(a)
        if a.op == "log":
            return self._term(a.args[0])
        if a.op == "sub" and a.args[1].op == "log":
            return self.quot(self.exp(a.args[0]), a.args[1].args[0])
        return self.make("exp", a)

    def log(self, a: Term) -> Term:
        """``log(a)``."""
        a = self._number(a)
        if a.op == "quot":
            return self.sub(self.log(a.args[0]), self.log(a.args[1]))
        return self._term(a.args[0]) if a.op == "exp" else self.make("log", a)

    def function(self, name: str, a: Term) -> Term:
        """``name(a)`` for a function without rules of its own: sigmoid, tanh, sqrt."""
        return self.make(name, self._number(a))

    def absolute(self, a: Term) -> Term:
        """``|a|``."""
        a = self._number(a)
        return a if is_positive(a) else self.make("abs", a)

    def power(self, a: Term, exponent: float) -> Term:
        """``a ** exponent`` for the exponents of norms."""
        if exponent == 1.0:
            return a
        if exponent == 2.0:
            return self.mul(a, a)
        if exponent == 0.5:
            return self.function("sqrt", a)
        if exponent in (-0.5, -1.0):
            return self.quot(self.one, self.power(self._number(a), -exponent))
        raise NotExpressible(f"the power {exponent}")

    def largest(self, terms: Iterable[Term]) -> Term:
        """The maximum of ``terms``."""
        members = sorted({self._number(t) for t in terms}, key=lambda term: term.number)
        return members[0] if len(members) == 1 else self.make("max", *members)

    def floor(self, a: Term, low: float) -> Term:
        """``max(a, low)``."""
        return self.make("floor", self._number(a), low)

    def detach(self, a: Term) -> Term:
        """``a`` without gradient: only a maximum loses nothing, because it cancels."""
        return a if a.op == "max" else self.make("detach", self._number(a))

    # Vectors.

    def vector(self, parts: dict[tuple[Term, ...], Term]) -> Term:
        """The vector ``sum coefficient * product(vectors)``."""
        ordered = sorted(parts.items(), key=lambda part: [term.number for term in part[0]])
        return self.make(VECTOR, *ordered)

    def unit(self, leaf: Term) -> Term:
        """One vector as it is."""
        return self.vector({(leaf,): self.one})

    def inner(self, a: Term) -> Term:
        """The sum of a vector over its channels."""
        if a.op != VECTOR:
            raise NotExpressible("a sum over channels of what has none")
        groups: dict[Term, list[Term]] = {}
        for factors, coefficient in a.args:
            groups.setdefault(coefficient, []).append(self.make("inner", *factors))
        if len(groups) > 1:
            raise NotExpressible("a projection of a weighted sum")
        return self.total(self.mul(c, self.total(members)) for c, members in groups.items())

    def _add_vectors(self, a: Term, b: Term) -> Term:
        if a.op != VECTOR or b.op != VECTOR:
            number = b if a.op == VECTOR else a
            if number.op == "const" and number.args[0] == 0.0:
                return a if a.op == VECTOR else b
            raise NotExpressible("a number added to a vector")
        parts = dict(a.args)
        for key, coefficient in b.args:
            parts[key] = self.add(parts[key], coefficient) if key in parts else coefficient
        return self.vector(parts)

    def _mul_vectors(self, a: Term, b: Term) -> Term:
        if a.op != VECTOR:
            a, b = b, a
        if b.op != VECTOR:
            return self.vector({key: self.mul(c, b) for key, c in a.args})
        if len(a.args) > 1 and len(b.args) > 1:
            raise NotExpressible("a product of two sums of vectors")
        parts: dict[tuple[Term, ...], Term] = {}
        for left, c in a.args:
            for right, d in b.args:
                key = tuple(sorted((*left, *right), key=lambda term: term.number))
                parts[key] = self.mul(c, d)
        return self.vector(parts)

    def _number(self, a: Term) -> Term:
        if a.op == VECTOR:
            raise NotExpressible("a function of a vector")
        return a

    def _term(self, a: Any) -> Term:
        assert isinstance(a, Term)
        return a


def is_positive(a: Term) -> bool:
    """Whether ``a`` is never negative, whatever its inputs."""
    if a.op in ("exp", "sigmoid", "abs", "sqrt"):
        return True
    if a.op in ("total", "quot", "mul"):
        return all(map(is_positive, a.args))
    if a.op == "shift":
        return a.args[1] >= 0 and is_positive(a.args[0])
    if a.op == "scale":
        return a.args[0] >= 0 and is_positive(a.args[1])
    if a.op == "floor":
        return bool(a.args[1] >= 0)
    return a.op == "const" and a.args[0] >= 0


def unshift(a: Term) -> tuple[Term, float]:
    """``(x, c)`` of ``x + c``; ``(a, 0)`` of anything else."""
    return (a.args[0], a.args[1]) if a.op == "shift" else (a, 0.0)


def factors(a: Term) -> tuple[float, list[Term], list[Term]]:
    """``a`` as a constant, the factors of a numerator and those of a denominator."""
    if a.op == "scale":
        constant, above, below = factors(a.args[1])
        return a.args[0] * constant, above, below
    if a.op == "const":
        return a.args[0], [], []
    if a.op in ("mul", "quot"):
        left, right = factors(a.args[0]), factors(a.args[1])
        if a.op == "mul":
            return left[0] * right[0], left[1] + right[1], left[2] + right[2]
        return left[0] / right[0], left[1] + right[2], left[2] + right[1]
    return 1.0, [a], []


def product(terms: Terms, members: Iterable[Term]) -> Term:
    """The product of ``members``."""
    return reduce(terms.mul, members, terms.one)
