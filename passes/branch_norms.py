"""Which norm a branch starts with: torch's own ones, and RMS norms that a model writes by hand.

    y = layer_norm(u, (C,), weight, shift, eps)
    y = rms_norm(u, (C,), weight, eps)
    v = u.float();  y = weight * (v * rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)).to(u.dtype)

The last one in any order of its casts and factors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mhc_compile.passes.opnames import is_in_place, op_name
from mhc_compile.passes.values import dims, dtype_of, is_float_tensor, rank
from mhc_compile.passes.vocabulary import CAST

_CALLS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
}
"""Norms of torch, with their arguments behind the input."""
_LAYER_NORM_EPS = 1e-5  # what F.layer_norm takes by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchNorm:
    """One norm of a branch input."""

    kind: str
    """A `mhc_compile.kernels.spec.BRANCH_NORMS`."""
    eps: float
    rounds: bool
    """Whether its result is rounded before the weight is applied."""
    weight: Node | None
    shift: Node | None
    nodes: tuple[Node, ...]
    """What it consists of, in order; the last one is its result."""


def find_branch_norm(readers: Sequence[Node], u: Node, dtype: torch.dtype) -> BranchNorm | str:
    """The norm that alone reads a branch input; or why there is none, in a sentence.

    Args:
        readers: of the values of ``u``.
        u: the branch input.
        dtype: its dtype, which graphs need not tell after a rewrite.
    """
    if len(readers) == 1 and op_name(readers[0]) in _CALLS:
        found = _of_call(readers[0], dtype)
    else:
        found = _by_hand(readers, u, dtype)
    if isinstance(found, str):
        return found
    if any(map(is_in_place, found.nodes)):
        return "the norm writes into its input"
    result = found.nodes[-1]
    if dtype_of(result) != dtype:
        return f"the norm gives {dtype_of(result)}, and the streams are {dtype}"
    inside = {u, *found.nodes}
    others = {user for node in found.nodes[:-1] for user in node.users} - inside
    if others or not inside.issuperset(readers):
        return "something else reads the branch input, or a part of its norm"
    return found


def _of_call(call: Node, dtype: torch.dtype) -> BranchNorm | str:
    kind = op_name(call)
    given: dict[str, Any] = dict(zip(("input", *_CALLS[kind]), call.args, strict=False))
    given |= call.kwargs
    width = dims(call)[-1]
    shape, eps = given["normalized_shape"], given.get("eps")
    sizes = list(shape) if isinstance(shape, tuple | list | torch.Size) else [shape]
    if len(sizes) != 1 or isinstance(sizes[0], Node):
        return f"{kind} normalises over other axes than the channels"
    if eps is None:
        if kind == "rms_norm" and dtype not in (torch.float32, torch.float64):
            return f"rms_norm without an eps takes one that depends on how it computes in {dtype}"
        eps = torch.finfo(dtype).eps if kind == "rms_norm" else _LAYER_NORM_EPS
    weight, shift = given.get("weight"), given.get("bias")
    if not isinstance(eps, float | int) or not all(
        vector is None or _is_vector(vector, width) for vector in (weight, shift)
    ):
        return f"{kind} has a weight or an eps of another kind"
    kind = kind.removesuffix("_norm")
    return BranchNorm(
        kind=kind, eps=float(eps), rounds=False, weight=weight, shift=shift, nodes=(call,)
    )


def _is_vector(value: Any, width: Any) -> bool:
    """Whether a value is a node with one number per channel."""
    return isinstance(value, Node) and is_float_tensor(value) and dims(value) == (width,)


def _by_hand(readers: Sequence[Node], u: Node, dtype: torch.dtype) -> BranchNorm | str:
    for wide in (u, *(reader for reader in readers if op_name(reader) in CAST)):
        inner = dtype if wide is u else _cast_to(wide, u, dtype)
        core = _core(wide)
        if core is None:
            continue
        if inner not in (torch.float32, torch.float64):
            return f"its norm is computed in {inner}"
        *nodes, scaled = core[1]
        first = [] if wide is u else [wide]
        eps, tail = core[0], _tail(scaled, u, dtype)
        if tail is None:
            return f"the norm does not end in {dtype}"
        factors, weight, rounds = tail
        return BranchNorm(
            kind="rms",
            eps=eps,
            rounds=rounds and dtype != inner,
            weight=weight,
            shift=None,
            nodes=(*first, *nodes, scaled, *factors),
        )
    return "the branch starts with no norm that is known"


def _core(v: Node) -> tuple[float, list[Node]] | None:
    """``v * rsqrt(mean(v * v) + eps)``: eps and the nodes."""
    for square in v.users:
        if not _is_square(square, v):
            continue
        mean = _only(square, "mean")
        if mean is None or not _is_over_channels(mean):
            continue
        for plus in mean.users:
            eps = _constant(plus, mean) if op_name(plus) == "add" else None
            if eps is None:
                continue
            for root in plus.users:
                found = _scaled(v, plus, root)
                if found:
                    return eps, [square, mean, plus, *found]
    return None


def _scaled(v: Node, plus: Node, root: Node) -> list[Node] | None:
    """The root of ``plus`` and ``v`` divided by it."""
    name = op_name(root)
    is_inverse = name == "rsqrt" or (name == "pow" and _constant(root, plus) == -0.5)
    if not is_inverse and name != "sqrt":
        return None
    for user in root.users:
        if is_inverse and op_name(user) == "mul" and set(user.all_input_nodes) == {v, root}:
            return [root, user]
        if not is_inverse and op_name(user) == "div" and user.args == (v, root):
            return [root, user]
    return None


def _is_square(node: Node, v: Node) -> bool:
    name = op_name(node)
    if name == "mul":
        return node.args == (v, v)
    return name == "square" or (name == "pow" and _constant(node, v) == 2)


def _is_over_channels(mean: Node) -> bool:
    axes = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim")
    last = axes[0] if isinstance(axes, tuple | list) and len(axes) == 1 else axes
    return keeps is True and last in (-1, rank(mean) - 1) and "dtype" not in mean.kwargs


def _constant(node: Node, operand: Node) -> float | None:
    """The number that an operation of two has besides ``operand``; None if it is none."""
    others = [arg for arg in node.args if arg is not operand]
    if node.kwargs or len(node.args) != 2 or len(others) != 1:
        return None
    return float(others[0]) if isinstance(others[0], int | float) else None


def _only(node: Node, name: str) -> Node | None:
    """The one reader of a node, if it is of this name."""
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) == name else None


def _tail(scaled: Node, u: Node, dtype: torch.dtype) -> tuple[list[Node], Node | None, bool] | None:
    """What follows, up to the last value in ``dtype``: nodes, weight, whether it rounds first."""
    best: tuple[list[Node], Node | None, bool] | None = None
    nodes: list[Node] = []
    weight, rounds, cast = None, False, False
    for node, factor in _steps(scaled, dims(scaled)[-1]):
        if node is not scaled:
            nodes.append(node)
        if factor is not None:
            if weight is not None:
                break
            weight, rounds = factor, cast
        elif node is not scaled:
            if _cast_to(node, u, dtype) != dtype:
                break
            cast = True
        if dtype_of(node) == dtype:
            best = list(nodes), weight, rounds
    return best


def _steps(scaled: Node, width: Any) -> Iterator[tuple[Node, Node | None]]:
    """Casts and products with vectors that follow one another, each with the vector."""
    node, factor = scaled, None
    while True:
        yield node, factor
        following = list(node.users)
        if len(following) != 1:
            return
        (user,) = following
        others = [arg for arg in user.all_input_nodes if arg is not node]
        if op_name(user) == "mul" and len(others) == 1 and _is_vector(others[0], width):
            factor = others[0]
        elif op_name(user) in CAST and node is user.args[0]:
            factor = None
        else:
            return
        node = user


def _cast_to(node: Node, u: Node, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that a cast gives; ``u`` as what it is cast like has ``dtype``."""
    if u in node.args[1:]:
        return dtype
    return dtype_of(node)
