"""Recognise the coefficients of a site: gates, scales, biases and projections of a normed state.

    gate = factor * sigmoid(h) + eps,   h = alpha * (X . phi) / rms(X) + bias

or, of unconstrained hyper-connections, ``h = alpha * tanh((X . phi) / rms(X)) + bias`` alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from mhc_compile.passes.chain_terms import Term, factors, unshift

_TINY = 1e-6
"""A bound on a norm below this is met by all-zero tokens alone."""


class Refused(Exception):  # noqa: N818 - becomes a line of the report
    """The algebra is one that no op computes; says why."""


@dataclass(frozen=True, slots=True)
class Logit:
    """``factor * product(scales) * f(column / rms) + bias_factor * bias``."""

    column: tuple[tuple[Term, ...], ...]
    """For each stream the vectors it is multiplied with; one entry if ``stream`` is set."""
    stream: int | None
    """The stream that alone is normed and projected; None: all of them."""
    norm_eps: float
    factor: float
    scales: tuple[Term, ...]
    bias: Term | None
    bias_factor: float
    is_bounded: bool
    """Whether f is tanh, or nothing."""

    @property
    def scale(self) -> tuple[float, tuple[Term, ...]]:
        """What all logits of a group have to share."""
        return self.factor, self.scales


@dataclass(frozen=True, slots=True)
class Gate:
    """``factor * sigmoid(logit) + eps``; of a bounded logit, the logit itself."""

    factor: float
    eps: float
    logit: Logit


def is_static(term: Term) -> bool:
    """Whether the number is the same for every token."""
    if term.op == "leaf":
        return not term.args[2]
    return term.op == "const" or (
        term.op not in ("inner", "vector") and all(is_static(a) for a in term.args if _is(a))
    )


def _is(argument: object) -> bool:
    return isinstance(argument, Term)


def match_gate(term: Term, root: Node, streams: int, channels: int) -> Gate:
    """The gate that computes ``term``.

    Raises:
        Refused: it is none.
    """
    inner, eps = unshift(term)
    factor = 1.0
    if inner.op == "scale":
        factor, inner = inner.args
    if inner.op != "sigmoid":
        return Gate(1.0, 0.0, match_logit(term, root, streams, channels, bounded=True))
    return Gate(factor, eps, match_logit(inner.args[0], root, streams, channels))


def match_logit(
    term: Term, root: Node, streams: int, channels: int, *, bounded: bool = False
) -> Logit:
    """The projection that computes ``term``.

    Args:
        term: a number per token.
        root: the state.
        streams: n.
        channels: C.
        bounded: whether to expect a tanh.

    Raises:
        Refused: it is no such projection.
    """
    term, constant = unshift(term)
    if constant:
        raise Refused("a coefficient adds a constant to its logit")
    temperature = 1.0
    if term.op == "scale" and term.args[1].op == "total":
        temperature, term = term.args
    members = list(term.args) if term.op == "total" else [term]
    dynamic = [member for member in members if not is_static(member)]
    static = [member for member in members if is_static(member)]
    if len(dynamic) != 1 or len(static) > 1:
        # The projection itself is a sum: of one inner product for each stream.
        dynamic, static = [term], []
    bias, bias_factor = (static[0] if static else None), temperature
    if bias is not None and bias.op == "scale":
        bias_factor, bias = bias_factor * bias.args[0], bias.args[1]
    if bias is not None and bias.op != "leaf":
        raise Refused("the bias of a coefficient is computed token by token")
    factor, above, below = factors(dynamic[0])
    factor *= temperature
    scales = tuple(member for member in above if is_static(member))
    rest = [member for member in above if not is_static(member)]
    if len(rest) == 1 and rest[0].op == "tanh" and not below:
        inner, above, below = factors(rest[0].args[0])
        column, stream, eps, norm = _projection(above, below, root, streams, channels)
        if not math.isclose(inner * norm, 1.0, rel_tol=1e-6):
            raise Refused("the argument of a tanh is scaled by a constant")
        is_bounded = True
    else:
        column, stream, eps, norm = _projection(rest, below, root, streams, channels)
        factor, is_bounded = factor * norm, False
    if is_bounded != bounded:
        raise Refused("a coefficient is neither a gate nor a bounded projection of the state")
    if any(scale.op != "leaf" for scale in scales):
        raise Refused("the scale of a coefficient is computed token by token")
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        factor = 1.0
    return Logit(column, stream, eps, factor, scales, bias, bias_factor, is_bounded)


def _projection(
    above: Sequence[Term], below: Sequence[Term], root: Node, streams: int, channels: int
) -> tuple[tuple[tuple[Term, ...], ...], int | None, float, float]:
    """Column, stream, eps of the norm, and a constant, of ``product(above) / product(below)``."""
    if len(above) != 1:
        raise Refused("a coefficient is no projection of the state")
    if len(below) != 1:
        raise Refused("a coefficient is a projection of the state, but not of a normed state")
    products = list(above[0].args) if above[0].op == "total" else [above[0]]
    column: dict[int, tuple[Term, ...]] = {}
    for part in products:
        if part.op != "inner":
            raise Refused("a coefficient is no projection of the state")
        own = [leaf for leaf in part.args if leaf.args[0] is root]
        others = tuple(leaf for leaf in part.args if leaf.args[0] is not root)
        if len(own) != 1 or not others or not all(map(is_static, others)):
            raise Refused("a coefficient is not linear in the normed state")
        if own[0].args[1] in column:
            raise Refused("a coefficient projects a stream twice")
        column[own[0].args[1]] = others
    normed, eps, constant = _norm(below[0], root, channels)
    if normed != set(range(streams)) and len(normed) > 1:
        raise Refused("the norm is over a part of the streams")
    if set(column) != normed:
        raise Refused("the norm and the projection are over different streams")
    stream = None if len(column) == streams else next(iter(column))
    return tuple(column[j] for j in sorted(column)), stream, eps, constant


def _norm(root_term: Term, root: Node, channels: int) -> tuple[set[int], float, float]:
    """Streams, eps (inside the root of the mean square) and 1/constant of one divisor."""
    low = 0.0
    if root_term.op == "floor":
        root_term, low = root_term.args
    if root_term.op == "shift":
        raise Refused("eps is added outside the root of the norm")
    if root_term.op != "sqrt" or low > _TINY:
        raise Refused("a coefficient is divided by something that is no RMS norm")
    squares, eps = unshift(root_term.args[0])
    factor = 1.0
    if squares.op == "scale":
        factor, squares = squares.args
    parts = list(squares.args) if squares.op == "total" else [squares]
    streams: set[int] = set()
    for part in parts:
        if part.op != "inner" or len(part.args) != 2 or part.args[0] is not part.args[1]:
            raise Refused("a coefficient is divided by something that is no RMS norm")
        if part.args[0].args[0] is not root:
            raise Refused("the norm is of something other than the state")
        streams.add(part.args[0].args[1])
    count = len(streams) * channels
    # sqrt(factor * sum + eps) = sqrt(factor * count) * sqrt(mean + eps / (factor * count)), and a
    # bound on the root is an eps inside it wherever the token is not all zero.
    eps = (eps + low * low) / (factor * count)
    return streams, eps, 1.0 / math.sqrt(factor * count)
