"""Where to look: tensors that an operation reads as a state of a few streams.

A state has an axis of 2 to 16 streams along which something sums products, or takes one stream, and
an axis of channels that the weights do not have. Most of these are no states: reading on decides.
"""

import math
from collections.abc import Iterator

from torch.fx import Node

from mhc_compile.kernels.spec import MAX_STREAMS
from mhc_compile.passes.axes import axis_order
from mhc_compile.passes.chain_ops import argument
from mhc_compile.passes.chain_products import einsum_labels
from mhc_compile.passes.chain_terms import NotExpressible
from mhc_compile.passes.opnames import first_input, op_name, two_inputs
from mhc_compile.passes.values import dims, is_float_tensor
from mhc_compile.passes.vocabulary import CAST, LAYOUT

State = tuple[Node, int, int]
"""A tensor, the axis of its streams and that of its channels."""


def candidate_states(node: Node) -> Iterator[State]:
    """The states that ``node`` may be reading."""
    for state, stream, channel in _direct(node):
        sizes = dims(state)
        stream, channel = stream % len(sizes), channel % len(sizes)
        if stream != channel and is_stream_count(sizes[stream]) and is_float_tensor(state):
            origin = _origin(state, stream, channel)
            if _is_read_twice(origin[0]):
                yield origin


def is_stream_count(size: object) -> bool:
    """Whether an axis of this size may hold streams."""
    return isinstance(size, int) and 2 <= size <= MAX_STREAMS


def _is_read_twice(state: Node) -> bool:
    """Whether two operations compute with a tensor: its weights come from the state they weigh.

    Keys and values of attention, with as many tokens as there may be streams, are read once.
    """
    stack, readers = [state], 0
    while stack:
        for user in stack.pop().users:
            if op_name(user) in LAYOUT | CAST or axis_order(user) is not None:
                stack.append(user)
            else:
                readers += 1
    return readers > 1


def _direct(node: Node) -> Iterator[State]:
    name = op_name(node)
    if name in ("sum", "mean"):
        yield from _of_sum(node)
    elif name in ("matmul", "bmm", "baddbmm"):
        factors = two_inputs(node)
        if factors is not None and all(len(dims(factor)) > 2 for factor in factors):
            left, right = factors
            yield right, -2, -1
            yield left, -1, -2
    elif name == "einsum":
        yield from _of_einsum(node)
    elif name in ("unbind", "select", "getitem"):
        yield from _of_stream(node)


def _of_sum(node: Node) -> Iterator[State]:
    product, axis = first_input(node), argument(node, 1, "dim")
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    if product is None or op_name(product) != "mul" or not isinstance(axis, int):
        return
    factors = two_inputs(product)
    if factors is None:
        return
    sizes = dims(product)
    for state, weights in (factors, factors[::-1]):
        if len(dims(state)) != len(sizes) or not dims(weights):
            continue
        padded = (1,) * (len(sizes) - len(dims(weights))) + dims(weights)
        free = [i for i, size in enumerate(padded) if size == 1 and dims(state)[i] != 1]
        if free:
            yield state, axis, free[-1]


def _of_einsum(node: Node) -> Iterator[State]:
    try:
        operands, inputs, out = einsum_labels(node)
    except NotExpressible:
        return
    if len(operands) != 2:
        return
    for k in (0, 1):
        own, other = inputs[k], inputs[1 - k]
        summed = [i for i, label in enumerate(own) if label in other and label not in out]
        free = [i for i, label in enumerate(own) if label not in other and label in out]
        shared = [label for label in own if label in other and label in out]
        if free and shared:
            for axis in summed:
                yield operands[k], axis, free[-1]


def _of_stream(node: Node) -> Iterator[State]:
    """A state of which single streams are taken; the first one speaks for all."""
    state = first_input(node)
    if state is None or len(dims(state)) < 3:
        return
    rank, axis = len(dims(state)), None
    if op_name(node) == "unbind":
        axis = argument(node, 1, "dim", 0)
    elif op_name(node) == "select" and argument(node, 2, "index") == 0:
        axis = argument(node, 1, "dim")
    elif op_name(node) == "getitem" and isinstance(node.args[1], tuple):
        index = node.args[1]
        if index.count(0) == 1 and None not in index:
            place = index.index(0)
            axis = place - len(index) if Ellipsis in index[:place] else place
    if isinstance(axis, int) and axis % rank != rank - 1:
        yield state, axis, rank - 1


def _origin(node: Node, stream: int, channel: int) -> State:
    """The state before casts and views that keep both axes."""
    while True:
        source = first_input(node)
        name = op_name(node)
        if source is None or not is_float_tensor(source):
            return node, stream, channel
        order = axis_order(node)
        if order is not None:
            stream, channel = order[stream], order[channel]
        elif name in LAYOUT:
            streams, channels = (_kept(node, axis, source) for axis in (stream, channel))
            if streams is None or channels is None:
                return node, stream, channel
            if _merges(node, source) and _is_read_twice(node):
                return node, stream, channel
            stream, channel = streams, channels
        elif name not in CAST:
            return node, stream, channel
        node = source


def _merges(view: Node, source: Node) -> bool:
    """Whether a view has other axes than its source, not counting those of size 1."""
    return [s for s in dims(view) if s != 1] != [s for s in dims(source) if s != 1]


def _kept(view: Node, axis: int, source: Node) -> int | None:
    """The axis of ``source`` that a view of it shows as one of its own; None if it is none."""
    sizes, wanted = dims(view), dims(source)
    before = math.prod(sizes[:axis])
    for place, size in enumerate(wanted):
        if size == sizes[axis] != 1 and math.prod(wanted[:place]) == before:
            return place
    return None
