"""Which axis of a trunk holds the channels.

Any choice preserves the model's function; the right one is the axis the network itself treats as
features, because ``phi`` then sees one token at a time.
"""

from collections import deque
from collections.abc import Container

from torch.fx import Node

from mhc_compile.passes.axes import axis_order
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims as sizes_of

# Axis of the features in the first operand, by operation. Convolutions and batch-like norms have
# them behind the batch axis, matrix products and layer norms at the end.
_LAST = frozenset({
    "linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "layer_norm", "rms_norm",
    "native_layer_norm",
})  # fmt: skip
_SECOND = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution",
    "batch_norm", "native_batch_norm", "group_norm", "native_group_norm", "instance_norm",
    "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "interpolate",
})  # fmt: skip
_SEARCH = 32  # operations; the first one that cares about the axis lies close to the origin


def channel_axis(origin: Node, branch: Container[Node]) -> int:
    """The channel axis of ``origin``, negative, as what makes or first uses it shows.

    Without evidence: the last axis, or the second one of a 4-D or 5-D value (images, video).

    Args:
        origin: a value of rank >= 1.
        branch: the nodes of the site's branch; others are not looked at.
    """
    rank = len(sizes_of(origin))
    if op_name(origin) in _SECOND and rank >= 3:
        return 1 - rank
    if op_name(origin) in _LAST:
        return -1
    queue = deque([(origin, tuple(range(rank)))])  # a value, and where each of its axes comes from
    seen = {origin}
    while queue and len(seen) < _SEARCH:
        value, axes = queue.popleft()
        for user in value.users:
            if user in seen or user not in branch:
                continue
            seen.add(user)
            name = op_name(user)
            first = first_input(user)
            if name in _LAST and first is value:
                return axes[-1] - rank
            if name in _SECOND and first is value and rank >= 3:
                return axes[1] - rank
            moved = _moved(user, value, axes)
            if moved is not None:
                queue.append((user, moved))
    return 1 - rank if rank >= 4 else -1


def _moved(user: Node, value: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of ``user`` in terms of the origin's; None where that cannot be followed."""
    order = axis_order(user)
    if order is not None:
        return tuple(axes[axis] for axis in order)
    return axes if sizes_of(user) == sizes_of(value) else None
