"""Recognise a Sinkhorn iteration in the entries of a matrix, with its exact constants.

    H = S_m(... S_2(S_1(exp(L))) ...),   S(M) = (M + a) / max(sum(M or M + a) + b, c)

with sums over columns and rows in turn. Softmax is such a step, and so is a log-softmax under an
``exp`` (`chain_terms` makes quotients of both). Entries are [out, in] throughout.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mhc_compile.passes.chain_terms import Term, unshift

Matrix = Sequence[Sequence[Term]]

COLUMNS, ROWS = 0, 1
"""Axis that a step sums over: columns are normalised by sums over the out index."""
_NEGLIGIBLE = 2.0**-24
"""Added to a float32 number >= 1, this changes nothing; and no divisor is ever as small."""


@dataclass(frozen=True, slots=True)
class Step:
    """One normalisation."""

    axis: int
    entry_eps: float
    """a: added to every entry before it is divided."""
    sums_entries: bool
    """Whether the sum is over entries with a, or without."""
    divisor_eps: float
    """b: added to the sum."""
    floor: float
    """c: the sum is at least this."""

    @property
    def form(self) -> tuple[float, bool, float, float]:
        """Everything but the axis."""
        return self.entry_eps, self.sums_entries, self.divisor_eps, self.floor


@dataclass(frozen=True, slots=True)
class Sinkhorn:
    """What an op has to be told."""

    constraint: str
    eps: float
    eps_at: str
    iters: int
    logits: Matrix
    """[out, in], before ``exp``, as far as they cancel without a maximum."""
    transposed: bool
    """Rows come first: the op runs on the transpose."""
    rest: Step | None
    """A last half iteration that stays in the graph."""
    entries: frozenset[Term]
    """The entries of every iterate but the start."""


def find_sinkhorn(matrix: Matrix) -> Sinkhorn | str:
    """The iteration that made ``matrix``, or why it is none that an op computes."""
    steps, stages, start = _peel(matrix)
    if len(steps) < 2:
        return "its mixing matrix is not made by normalising rows and columns in turn"
    for before, after in itertools.pairwise(steps):
        if before.axis == after.axis:
            name = "columns" if after.axis == COLUMNS else "rows"
            return f"its Sinkhorn iteration normalises {name} twice in succession"
    rest = steps[-1] if len(steps) % 2 else None
    kept = steps[: len(steps) - len(steps) % 2]
    logits = _logits(start, kept[0])
    if isinstance(logits, str):
        return logits
    entries, cancelled = logits
    kind = _classify(kept, cancelled)
    if kind is None:
        return "its Sinkhorn iteration adds eps in places for which there is no op"
    name, eps, place = kind
    iterates = frozenset(entry for stage in stages[:-1] for row in stage for entry in row)
    first_rows = kept[0].axis == ROWS
    return Sinkhorn(name, eps, place, len(kept) // 2, entries, first_rows, rest, iterates)


def _peel(matrix: Matrix) -> tuple[list[Step], list[Matrix], Matrix]:
    """The steps in order, the matrix after the last, the last but one, ..., and the start."""
    steps: list[Step] = []
    stages = [matrix]
    while (found := _last_step(stages[-1])) is not None:
        step, before = found
        steps.insert(0, step)
        stages.append(before)
    return steps, stages, stages[-1]


def _last_step(matrix: Matrix) -> tuple[Step, Matrix] | None:
    if any(entry.op != "quot" for row in matrix for entry in row):
        return None
    above = [[entry.args[0] for entry in row] for row in matrix]
    below = [[entry.args[1] for entry in row] for row in matrix]
    by_column = all(row == below[0] for row in below)
    by_row = all(divisor is row[0] for row in below for divisor in row)
    if by_column == by_row:
        return None
    lines = _transposed(above) if by_column else above
    divisors = below[0] if by_column else [row[0] for row in below]
    plain, entry_eps = _without_eps(lines)
    forms = {_divisor(d, x, y) for d, x, y in zip(divisors, lines, plain, strict=True)}
    if len(forms) != 1 or (form := forms.pop()) is None:
        return None
    step = Step(COLUMNS if by_column else ROWS, entry_eps, *form)
    return step, _transposed(plain) if by_column else plain


def _without_eps(lines: Matrix) -> tuple[Matrix, float]:
    """What a constant was added to, and the constant: the same one for every entry, or none."""
    constants = {unshift(entry)[1] for line in lines for entry in line}
    if len(constants) != 1:
        return lines, 0.0
    return [[unshift(entry)[0] for entry in line] for line in lines], constants.pop()


def _divisor(
    divisor: Term, line: Sequence[Term], plain: Sequence[Term]
) -> tuple[bool, float, float] | None:
    """``sums_entries``, b and c of one divisor; None if it is no sum of the line."""
    low = 0.0
    if divisor.op == "floor":
        divisor, low = divisor.args
    for total, eps in ((divisor, 0.0), unshift(divisor)):
        if total.op == "total":
            members = list(total.args)
            for entries, shifted in ((line, True), (plain, False)):
                if members == sorted(entries, key=lambda term: term.number):
                    return shifted and line is not plain and line != plain, eps, low
    return None


def _logits(start: Matrix, first: Step) -> tuple[Matrix, bool] | str:
    """What the first step exponentiates, and whether a maximum was taken out that cancels."""
    if any(entry.op != "exp" for row in start for entry in row):
        return "its Sinkhorn iteration does not start from exp or softmax"
    logits: Matrix = [[entry.args[0] for entry in row] for row in start]
    if any(entry.op != "sub" for row in logits for entry in row):
        return logits, False
    shifts = [[entry.args[1] for entry in row] for row in logits]
    lines = _transposed(shifts) if first.axis == COLUMNS else shifts
    negligible = max(first.entry_eps, first.divisor_eps, first.floor) <= _NEGLIGIBLE
    if negligible and all(shift is line[0] for line in lines for shift in line):
        return [[entry.args[0] for entry in row] for row in logits], True
    return logits, False


def _classify(steps: Sequence[Step], cancelled: bool) -> tuple[str, float, str] | None:
    """Constraint, eps and its place; None if no constraint computes these steps.

    Args:
        steps: alternating, an even number.
        cancelled: a maximum was taken out, so that the first sums are at least 1.
    """
    zero = (0.0, False, 0.0, 0.0)
    forms = [step.form for step in steps]
    first = forms[0]
    if cancelled:  # an eps on a sum >= 1 vanishes; sums of later steps are at least 1 / n^2
        first = zero
    if first == zero:
        # A floor below 1 / n^2 is never reached once the first step has been taken.
        forms = [f if f[3] > _NEGLIGIBLE else (f[0], f[1], f[2], 0.0) for f in forms]
        later = set(forms[1:])
        if later == {zero}:
            return "sinkhorn", 0.0, "divisor"
        if len(later) == 1 and (eps := forms[1][2]) and forms[1] == (0.0, False, eps, 0.0):
            return "sinkhorn", eps, "divisor"
        eps = forms[1][2]
        if forms[1] == (eps, True, eps, 0.0) and set(forms[2:]) <= {(0.0, False, eps, 0.0)}:
            return "sinkhorn_softmax", eps, "divisor"
    if cancelled or len(set(forms)) != 1:
        return None
    entry, shifted, divisor, floor = forms[0]
    places = {
        (0.0, False, divisor, 0.0): ("divisor", divisor),
        (entry, True, 0.0, 0.0): ("entries", entry),
        (divisor, False, divisor, 0.0): ("both", divisor),
        (0.0, False, 0.0, floor): ("floor", floor),
    }
    found = places.get((entry, shifted, divisor, floor))
    return None if found is None else ("sinkhorn_exp", found[1], found[0])


def _transposed(matrix: Matrix) -> list[list[Term]]:
    return [list(column) for column in zip(*matrix, strict=True)]


def transposed(matrix: Matrix) -> Matrix:
    """The matrix with rows and columns exchanged."""
    return _transposed(matrix)
