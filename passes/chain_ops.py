"""What each operation makes of values (`chain_values`), by the names of `opnames.op_name`.

An operation that is missing here, or that has no meaning per token, ends the reading there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.passes.axes import PERMUTATIONS, axis_order
from mhc_compile.passes.chain_products import einsum, linear, matmul
from mhc_compile.passes.chain_scope import Known, Scope
from mhc_compile.passes.chain_terms import NotExpressible
from mhc_compile.passes.chain_values import (
    Value,
    broadcast,
    expand,
    join,
    permute,
    reduced_groups,
    reshape,
    select,
    summed,
)
from mhc_compile.passes.opnames import first_input, op_name, two_inputs
from mhc_compile.passes.values import dims, dtype_of
from mhc_compile.passes.vocabulary import CAST

Rule = Callable[[Scope, Node], Known]


def read(scope: Scope, node: Node) -> Known:
    """The value of ``node``, at least one input of which has one.

    Raises:
        NotExpressible: the operation has no meaning per token.
    """
    name = op_name(node)
    rule = _RULES.get(name)
    if rule is not None:
        return rule(scope, node)
    if name in PERMUTATIONS:
        order = axis_order(node)
        if order is not None:
            return permute(_first(scope, node), order)
    if name in CAST:
        return _cast(scope, node)
    raise NotExpressible(f"the operation {name}")


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by place or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _first(scope: Scope, node: Node) -> Value:
    value = scope.value(first_input(node))
    if value is None:
        raise NotExpressible("an operation on something else")
    return value


def _axis(value: Value, axis: Any) -> int:
    rank = len(value.dims)
    if not isinstance(axis, int) or not -rank <= axis < rank:
        raise NotExpressible("an axis that is no constant")
    return axis % rank


def _axes(value: Value, given: Any) -> list[int]:
    if given is None:
        return list(range(len(value.dims)))
    return [_axis(value, a) for a in (given if isinstance(given, list | tuple) else (given,))]


def _reshaped(scope: Scope, node: Node) -> Value:
    return reshape(_first(scope, node), dims(node))


def _expanded(scope: Scope, node: Node) -> Value:
    value, sizes = _first(scope, node), dims(node)
    padded = (1,) * (len(sizes) - len(value.dims)) + value.sizes
    if any(old not in (1, new) for old, new in zip(padded, sizes, strict=True)):
        raise NotExpressible("a repetition of more than one")
    return expand(value, sizes)


def _same(scope: Scope, node: Node) -> Value:
    return _first(scope, node)


def _cast(scope: Scope, node: Node) -> Value:
    dtype = dtype_of(node)
    if dtype is None or not dtype.is_floating_point:
        raise NotExpressible("a cast to integers")
    return _first(scope, node)


def _detached(scope: Scope, node: Node) -> Value:
    return _first(scope, node).map(scope.terms.detach)


def _dropped(scope: Scope, node: Node) -> Value:
    rate, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if rate != 0 and training is not False:
        raise NotExpressible("dropout")
    return _first(scope, node)


def _item(scope: Scope, node: Node) -> Value:
    source, index = node.args[0], node.args[1]
    known = scope.values.get(source) if isinstance(source, Node) else None
    if isinstance(known, tuple):
        assert isinstance(index, int)
        return known[index]
    if known is None:
        raise NotExpressible("an index")
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        given = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (len(known.dims) - given)
    axis, value = 0, known
    for part in parts:
        if part is None:
            value = Value((*value.dims[:axis], (), *value.dims[axis:]), value.items)
            axis += 1
        elif isinstance(part, int | slice):
            value = select(value, axis, part)
            axis += not isinstance(part, int)
        else:
            raise NotExpressible("an index that is a tensor")
    return value


def _selected(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    index = _constant(argument(node, 2, "index"))
    return select(value, _axis(value, argument(node, 1, "dim")), index)


def _sliced(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    part = slice(start, end, argument(node, 4, "step", 1))
    return select(value, _axis(value, argument(node, 1, "dim", 0)), part)


def _narrowed(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    start = _constant(argument(node, 2, "start"))
    stop = start + _constant(argument(node, 3, "length"))
    return select(value, _axis(value, argument(node, 1, "dim")), slice(start, stop))


def _constant(number: Any) -> int:
    if not isinstance(number, int):
        raise NotExpressible("a size that is no constant")
    return number


def _parts(value: Value, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(
        select(value, axis, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)
    )


def _split(scope: Scope, node: Node) -> Known:
    value = _first(scope, node)
    name = "split_sizes" if op_name(node) == "split_with_sizes" else "split_size_or_sections"
    given = argument(node, 1, name, node.kwargs.get("split_size"))
    axis = _axis(value, argument(node, 2, "dim", 0))
    whole = _constant(value.sizes[axis])
    if isinstance(given, int):
        given = [min(given, whole - at) for at in range(0, whole, given)]
    return _parts(value, axis, [_constant(size) for size in given])


def _chunked(scope: Scope, node: Node) -> Known:
    value = _first(scope, node)
    axis = _axis(value, argument(node, 2, "dim", 0))
    whole = _constant(value.sizes[axis])
    step = -(-whole // _constant(argument(node, 1, "chunks")))
    return _parts(value, axis, [min(step, whole - at) for at in range(0, whole, step)])


def _unbound(scope: Scope, node: Node) -> Known:
    value = _first(scope, node)
    axis = _axis(value, argument(node, 1, "dim", 0))
    return tuple(select(value, axis, i) for i in range(_constant(value.sizes[axis])))


def _members(scope: Scope, node: Node) -> tuple[list[Value], int]:
    given = argument(node, 0, "tensors")
    values = [scope.value(member) for member in given]
    if any(value is None for value in values):
        raise NotExpressible("a concatenation with something else")
    return [value for value in values if value is not None], argument(node, 1, "dim", 0)


def _joined(scope: Scope, node: Node) -> Value:
    values, axis = _members(scope, node)
    return join(values, _axis(values[0], axis))


def _stacked(scope: Scope, node: Node) -> Value:
    values, axis = _members(scope, node)
    axis %= len(values[0].dims) + 1
    return join([Value((*v.dims[:axis], (), *v.dims[axis:]), v.items) for v in values], axis)


def _operands(scope: Scope, node: Node) -> tuple[Value, Value]:
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    left, right = scope.value(a), scope.value(b)
    like = left if left is not None else right
    if like is None:
        raise NotExpressible("an operation on something else")
    return scope.operand(a, like), scope.operand(b, like)


def _pointwise(function: str) -> Rule:
    def rule(scope: Scope, node: Node) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise NotExpressible("a scaled operation")
        a, b = _operands(scope, node)
        return _combine(scope, function, a, b)

    return rule


def _combine(scope: Scope, function: str, a: Value, b: Value) -> Value:
    axes, left, right = broadcast(a, b)
    operation = getattr(scope.terms, function)
    return Value(axes, tuple(map(operation, left, right)))


def _function(name: str) -> Rule:
    def rule(scope: Scope, node: Node) -> Value:
        return _first(scope, node).map(lambda term: scope.terms.function(name, term))

    return rule


def _method(name: str, *constants: float) -> Rule:
    """A method of `Terms` that takes the operand last, or first and then ``constants``."""

    def rule(scope: Scope, node: Node) -> Value:
        method = getattr(scope.terms, name)
        return _first(scope, node).map(lambda term: method(term, *constants))

    return rule


def _negated(scope: Scope, node: Node) -> Value:
    return _first(scope, node).map(lambda term: scope.terms.scale(-1.0, term))


def _power(scope: Scope, node: Node) -> Value:
    exponent = argument(node, 1, "exponent")
    if not isinstance(exponent, int | float):
        raise NotExpressible("a power that is no constant")
    return _first(scope, node).map(lambda term: scope.terms.power(term, float(exponent)))


def _clamped(scope: Scope, node: Node) -> Value:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if not isinstance(low, int | float) or high is not None:
        raise NotExpressible("a clamp")
    return _first(scope, node).map(lambda term: scope.terms.floor(term, float(low)))


def _summed(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    axes = _axes(value, argument(node, 1, "dim"))
    return summed(scope.terms, value, axes, bool(argument(node, 2, "keepdim", False)))


def _mean(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    axes = _axes(value, argument(node, 1, "dim"))
    return _mean_over(scope, value, axes, bool(argument(node, 2, "keepdim", False)))


def _mean_over(scope: Scope, value: Value, axes: Sequence[int], keep: bool) -> Value:
    total = summed(scope.terms, value, axes, keep)
    count = math.prod(_constant(value.sizes[axis]) for axis in axes)
    return total.map(lambda term: scope.terms.scale(1.0 / count, term))


def _largest(scope: Scope, node: Node) -> Known:
    value = _first(scope, node)
    given = argument(node, 1, "dim")
    reduced = reduced_groups(value, _axes(value, given))
    axes = reduced.dims(bool(argument(node, 2, "keepdim", False)))
    largest = Value(axes, tuple(scope.terms.largest(group) for group in reduced.groups))
    # x.max(dim) is a pair; nobody can use its indices here.
    return (largest,) if op_name(node) == "max" and given is not None else largest


def _attribute(scope: Scope, node: Node) -> Value:
    known = scope.values.get(node.args[0])  # type: ignore[arg-type]
    if isinstance(known, tuple) and node.args[1] == "values":
        return known[0]
    raise NotExpressible("an attribute")


def _exponentials(scope: Scope, value: Value, axis: Any) -> tuple[Value, Value]:
    """``exp(x)`` and its sum along ``axis``, kept."""
    exponentials = value.map(scope.terms.exp)
    return exponentials, summed(scope.terms, exponentials, [_axis(value, axis)], keep=True)


def _softmax(scope: Scope, node: Node) -> Value:
    above, below = _exponentials(scope, _first(scope, node), argument(node, 1, "dim"))
    return _combine(scope, "quot", above, below)


def _log_softmax(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    _, total = _exponentials(scope, value, argument(node, 1, "dim"))
    return _combine(scope, "sub", value, total.map(scope.terms.log))


def _logsumexp(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    total = summed(
        scope.terms,
        value.map(scope.terms.exp),
        _axes(value, argument(node, 1, "dim")),
        bool(argument(node, 2, "keepdim", False)),
    )
    return total.map(scope.terms.log)


_WHERE = ("condition", "input", "other")


def _guarded(scope: Scope, node: Node) -> Value:
    """``where(|m| == inf, 0, m)`` is m for finite logits; so ATen decomposes logsumexp."""
    condition, instead, value = (argument(node, i, name) for i, name in enumerate(_WHERE))
    known = scope.value(value)
    size = first_input(condition) if isinstance(condition, Node) else None
    if (
        known is None
        or not isinstance(condition, Node)
        or (op_name(condition), *condition.args[1:]) != ("eq", math.inf)
        or size is None
        or (op_name(size), first_input(size)) != ("abs", value)
        or not isinstance(instead, Node)
        or (op_name(instead), *instead.args[:1]) != ("scalar_tensor", 0.0)
    ):
        raise NotExpressible("a choice")
    return known


def _norm_of(scope: Scope, value: Value, order: Any, axes: Sequence[int], keep: bool) -> Value:
    if order == 1:
        return summed(scope.terms, value.map(scope.terms.absolute), axes, keep)
    if order not in (2, None, "fro"):
        raise NotExpressible(f"a norm of order {order}")
    squares = value.map(lambda term: scope.terms.mul(term, term))
    total = summed(scope.terms, squares, axes, keep)
    return total.map(lambda term: scope.terms.function("sqrt", term))


def _normalized(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    axis, low = _axis(value, argument(node, 2, "dim", 1)), argument(node, 3, "eps", 1e-12)
    norm = _norm_of(scope, value, argument(node, 1, "p", 2.0), [axis], keep=True)
    return _combine(scope, "quot", value, norm.map(lambda term: scope.terms.floor(term, low)))


def _vector_norm(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    order = argument(node, 1, "p" if op_name(node) == "norm" else "ord", 2)
    axes = _axes(value, argument(node, 2, "dim"))
    return _norm_of(scope, value, order, axes, bool(argument(node, 3, "keepdim", False)))


def _rms_norm(scope: Scope, node: Node) -> Value:
    value = _first(scope, node)
    axes = list(range(len(value.dims)))[-len(argument(node, 1, "normalized_shape")) :]
    eps = argument(node, 3, "eps")
    eps = torch.finfo(dtype_of(node) or torch.float32).eps if eps is None else eps
    squares = value.map(lambda term: scope.terms.mul(term, term))
    mean = _mean_over(scope, squares, axes, keep=True)
    root = mean.map(
        lambda term: scope.terms.function("sqrt", scope.terms.add(term, scope.terms.const(eps)))
    )
    normed = _combine(scope, "quot", value, root)
    weight = argument(node, 2, "weight")
    if weight is None:
        return normed
    return _combine(scope, "mul", normed, scope.operand(weight, normed))


def _product_added(scope: Scope, node: Node) -> Value:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        raise NotExpressible("a scaled operation")
    product = _product(scope, node)
    return _combine(scope, "add", product, scope.operand(first_input(node), product))


def _product(scope: Scope, node: Node) -> Value:
    factors = two_inputs(node)
    if factors is None:
        raise NotExpressible("a product of something else")
    return matmul(scope, *factors)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "view_as", "reshape", "_reshape_alias", "reshape_as", "flatten",
         "unflatten", "ravel", "squeeze", "unsqueeze"), _reshaped,
    ),
    **dict.fromkeys(("contiguous", "clone", "alias", "lift_fresh_copy", "positive"), _same),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat"), _expanded),
    "detach": _detached, "dropout": _dropped, "getitem": _item, "select": _selected,
    "slice": _sliced, "narrow": _narrowed, "split": _split, "split_with_sizes": _split,
    "chunk": _chunked, "unbind": _unbound, "cat": _joined, "stack": _stacked,
    "values": _attribute,
    "add": _pointwise("add"), "sub": _pointwise("sub"), "mul": _pointwise("mul"),
    "div": _pointwise("quot"),
    "neg": _negated, "pow": _power, "square": _method("power", 2.0),
    "sqrt": _method("power", 0.5), "rsqrt": _method("power", -0.5),
    "reciprocal": _method("power", -1.0),
    "exp": _method("exp"), "log": _method("log"), "abs": _method("absolute"),
    "sigmoid": _function("sigmoid"), "tanh": _function("tanh"),
    "clamp": _clamped, "clamp_min": _clamped,
    "sum": _summed, "mean": _mean, "amax": _largest, "max": _largest,
    "softmax": _softmax, "_softmax": _softmax, "log_softmax": _log_softmax,
    "_log_softmax": _log_softmax, "logsumexp": _logsumexp, "where": _guarded,
    "normalize": _normalized,
    "linalg_vector_norm": _vector_norm, "norm": _vector_norm, "rms_norm": _rms_norm,
    "linear": linear, "einsum": einsum,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), _product),
    "baddbmm": _product_added, "addmm": _product_added,
}  # fmt: skip
