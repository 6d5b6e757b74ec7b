"""Products of tensors as sums along labelled axes: matrix products, linear layers and einsum."""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from mhc_compile.passes.chain_scope import Scope
from mhc_compile.passes.chain_terms import NotExpressible
from mhc_compile.passes.chain_values import Value, broadcast, permute, summed
from mhc_compile.passes.values import dims


def contract(scope: Scope, a: Any, a_labels: str, b: Any, b_labels: str, out_labels: str) -> Value:
    """The product of two tensors, summed over the labels that ``out_labels`` lacks.

    Raises:
        NotExpressible: it has no meaning per token.
    """
    for labels in (a_labels, b_labels, out_labels):
        if len(set(labels)) != len(labels):
            raise NotExpressible("a diagonal")
    left, right = scope.value(a), scope.value(b)
    if left is None and right is None:
        raise NotExpressible("a product of other things")
    left = left if left is not None else _adopted(scope, a, a_labels, right, b_labels)
    right = right if right is not None else _adopted(scope, b, b_labels, left, a_labels)
    inner = [label for label in dict.fromkeys(a_labels + b_labels) if label not in out_labels]
    order = [*out_labels, *inner]
    axes, one, two = broadcast(_ordered(left, a_labels, order), _ordered(right, b_labels, order))
    product = Value(axes, tuple(map(scope.terms.mul, one, two)))
    if not inner:
        return product
    return summed(scope.terms, product, range(len(out_labels), len(order)), keep=False)


def _adopted(scope: Scope, node: Any, labels: str, like: Value | None, like_labels: str) -> Value:
    if not isinstance(node, Node) or like is None:
        raise NotExpressible("a product with something else")
    known = dict(zip(like_labels, like.dims, strict=True))
    return scope.adopt(node, [known.get(label) for label in labels], like)


def _ordered(value: Value, labels: str, order: Sequence[str]) -> Value:
    there = [label for label in order if label in labels]
    moved = permute(value, [labels.index(label) for label in there])
    axes = dict(zip(there, moved.dims, strict=True))
    return Value(tuple(axes.get(label, ()) for label in order), moved.items)


def matmul(scope: Scope, a: Any, b: Any) -> Value:
    """``a @ b`` for operands of any rank."""
    ranks = [len(dims(operand)) if isinstance(operand, Node) else 0 for operand in (a, b)]
    if 0 in ranks:
        raise NotExpressible("a product with something else")
    batch = "".join(chr(ord("A") + i) for i in range(max(*ranks, 2) - 2))[::-1]
    lead = [batch[len(batch) - max(rank - 2, 0) :] for rank in ranks]
    left = lead[0] + ("ij" if ranks[0] > 1 else "j")
    right = lead[1] + ("jk" if ranks[1] > 1 else "j")
    out = batch + "i" * (ranks[0] > 1) + "k" * (ranks[1] > 1)
    return contract(scope, a, left, b, right, out)


def linear(scope: Scope, node: Node) -> Value:
    """``x @ weight.T + bias``."""
    x, weight, bias = (
        node.args[place] if len(node.args) > place else node.kwargs.get(name)
        for place, name in enumerate(("input", "weight", "bias"))
    )
    rank = len(dims(x)) if isinstance(x, Node) else 0
    lead = "".join(chr(ord("A") + i) for i in range(rank - 1))
    product = contract(scope, x, lead + "j", weight, "kj", lead + "k")
    return product if bias is None else add_product(scope, product, bias)


def add_product(scope: Scope, product: Value, bias: Any) -> Value:
    """``product + bias``."""
    axes, one, two = broadcast(product, scope.operand(bias, product))
    return Value(axes, tuple(map(scope.terms.add, one, two)))


def einsum(scope: Scope, node: Node) -> Value:
    """``einsum(equation, a)`` and ``einsum(equation, a, b)``."""
    operands, inputs, out = einsum_labels(node)
    if len(operands) == 1 and (value := scope.value(operands[0])) is not None:
        if len(set(inputs[0])) != len(inputs[0]):
            raise NotExpressible("a diagonal")
        order = [*out, *(label for label in inputs[0] if label not in out)]
        moved = _ordered(value, inputs[0], order)
        return summed(scope.terms, moved, range(len(out), len(order)), keep=False)
    if len(operands) != 2:
        raise NotExpressible("an einsum of more than two operands")
    return contract(scope, operands[0], inputs[0], operands[1], inputs[1], out)


def einsum_labels(node: Node) -> tuple[list[Node], list[str], str]:
    """Operands, their labels and those of the result.

    Raises:
        NotExpressible: the equation has another form.
    """
    equation, *rest = (*node.args, *node.kwargs.values())
    given = rest[0] if rest and isinstance(rest[0], list | tuple) else rest
    operands = [operand for operand in given if isinstance(operand, Node)]
    if not isinstance(equation, str) or len(operands) != len(given):
        raise NotExpressible("an einsum of another form")
    inputs, out = _labels(equation, [len(dims(operand)) for operand in operands])
    return operands, inputs, out


def _labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Labels of each operand and of the result, an ellipsis written out in capital letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks) or any(letter.isupper() for letter in left):
        raise NotExpressible("an einsum of another form")
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    ellipsis = "".join(chr(ord("A") + i) for i in range(max(hidden)))
    inputs = [
        term.replace("...", ellipsis[len(ellipsis) - count :])
        for term, count in zip(terms, hidden, strict=True)
    ]
    if not arrow:
        once = [c for c in sorted(set(left) - set(".,")) if left.count(c) == 1]
        return inputs, ellipsis + "".join(once)
    return inputs, right.replace("...", ellipsis)
