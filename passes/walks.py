"""The way up from a skip: through what keeps it a copy, or an affine image, of one value."""

from collections.abc import Callable

from torch.fx import Node

from mhc_compile.passes.flow import FlowIndex
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.sums import operands
from mhc_compile.passes.values import is_tensor, numel, rank
from mhc_compile.passes.vocabulary import (
    ACTIVATION,
    CAST,
    CONVOLUTION,
    DROPOUT,
    LAYOUT,
    MATMUL,
    NORM,
    POOLING,
    SCALE,
)

_SLICES = frozenset({"getitem", "slice", "narrow"})  # copies if they take everything
PROJECTIONS = CONVOLUTION | MATMUL | POOLING


def plain_walk(index: FlowIndex, skip: Node) -> tuple[Node, ...]:
    """``skip`` and what it copies: through layout, casts, dropout and scales (clause 2)."""
    return _walk(index, skip, plain_step)


def affine_walk(index: FlowIndex, skip: Node) -> tuple[Node, ...]:
    """``skip`` and what it is affine in: also norms, linear, conv, pool, slices (clause 8)."""
    return _walk(index, skip, _affine_step)


def activated_walk(index: FlowIndex, skip: Node) -> tuple[Node, ...]:
    """`affine_walk`, and on through one activation and the norm it follows.

    That is how a pre-activation block may prepare its shortcut: ``conv(relu(norm(x)))``.
    """
    walk = affine_walk(index, skip)
    norm = first_input(walk[-1]) if op_name(walk[-1]) in ACTIVATION else None
    if norm is None or op_name(norm) not in NORM:
        return walk
    return (*walk, *affine_walk(index, norm)[:2])


def plain_step(index: FlowIndex, node: Node) -> Node | None:
    """The value that ``node`` copies, or scales by constants; None if it does anything more."""
    name = op_name(node)
    if name in LAYOUT or name in CAST or name in DROPOUT:
        return first_input(node)
    if name in _SLICES:
        source = first_input(node)
        if source is None or not is_tensor(source):
            return source if source is not None and _has_one_result(source) else None
        return source if numel(source) == numel(node) else None
    return _scaled(index, node) if name in SCALE else None


def is_slice(node: Node) -> bool:
    """Whether the node takes a part of a tensor, along any axes: ``x[:, 1:]``."""
    source = first_input(node)
    return (
        op_name(node) in _SLICES
        and source is not None
        and is_tensor(source)
        and rank(node) == rank(source)
        and not any(isinstance(arg, Node) and is_tensor(arg) for arg in _index(node))
    )


def _index(node: Node) -> tuple[object, ...]:
    index = node.args[1] if len(node.args) > 1 else ()
    return tuple(index) if isinstance(index, tuple | list) else (index,)


def _has_one_result(node: Node) -> bool:
    """Whether a tuple holds one value, and else what belongs to it: a mask, statistics."""
    return op_name(node) in DROPOUT or op_name(node) in NORM


def _walk(
    index: FlowIndex, skip: Node, step: Callable[[FlowIndex, Node], Node | None]
) -> tuple[Node, ...]:
    walk = [skip]
    while (above := step(index, walk[-1])) is not None:
        walk.append(above)
    return tuple(walk)


def _affine_step(index: FlowIndex, node: Node) -> Node | None:
    plain = plain_step(index, node)
    if plain is not None:
        return plain
    if is_slice(node):
        return first_input(node)
    name = op_name(node)
    if name in NORM or name in PROJECTIONS or name == "sub" or operands(node) is not None:
        varying = index.varying_inputs(node)
        return varying[0] if len(varying) == 1 else None
    return _pooled(node)


def _pooled(node: Node) -> Node | None:
    """What a max-pooling written as a view and a maximum over its new axis reads."""
    source = first_input(node)
    if source is None:
        return None
    if op_name(node) == "getitem":  # max(dim) returns values and indices
        return source if op_name(source) == "max" and node.args[1] == 0 else None
    viewed = first_input(source)
    is_split = viewed is not None and op_name(source) in LAYOUT and rank(source) > rank(viewed)
    is_maximum = op_name(node) in ("amax", "max") and node.all_input_nodes == [source]
    return source if is_maximum and is_split else None


def _scaled(index: FlowIndex, node: Node) -> Node | None:
    factors = [arg for arg in node.args[:2] if isinstance(arg, Node) and is_tensor(arg)]
    if len(factors) > 1:
        factors = [factor for factor in factors if index.varies(factor)]
    if len(factors) != 1 or numel(factors[0]) != numel(node):
        return None
    if op_name(node) == "div" and factors[0] is not node.args[0]:
        return None  # c / x
    return factors[0]
