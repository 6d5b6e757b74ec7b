"""How one tensor came from another, as autograd's graph tells."""

import heapq
import re
from collections.abc import Callable
from typing import Any

import torch

# "AddmmBackward0": an operation of torch. Functions that users write have no number.
_OPERATION = re.compile(r"^(\w+?)Backward\d+$")
_COPIES = frozenset({"AccumulateGrad", "CopyBackwards", "CopySlices"})
OPAQUE = -1
"""What stands for code that autograd does not show: a function of the user's, a compiled graph."""


def kinds_between(
    later: torch.Tensor, earlier: torch.Tensor, kind_of: Callable[[str | int], int]
) -> int | None:
    """The best of all ways from ``earlier`` to ``later``: the bits of its operations, or-ed.

    Only what was computed after ``earlier`` is looked at.

    Args:
        later: a tensor with a history.
        earlier: another one.
        kind_of: bits of an operation, by its name (``layer_norm``) or `OPAQUE`.

    Returns:
        The or with most bits; None if no gradient leads from one to the other.
    """
    goal, start = earlier.grad_fn, later.grad_fn
    if goal is None or start is None or goal is start:
        return None
    floor = goal._sequence_nr()
    reached: dict[Any, set[int]] = {start: {0}}
    waiting = [(-start._sequence_nr(), 0, start)]
    count = 0
    found: set[int] = set()
    while waiting:
        _, _, node = heapq.heappop(waiting)
        kinds = {kind | kind_of(_operation(node)) for kind in reached[node]}
        for source, number in node.next_functions:
            if source is goal:
                found |= kinds if number == earlier.output_nr else set()
            elif source is not None and source.next_functions and source._sequence_nr() > floor:
                if source not in reached:
                    count += 1  # nodes have no order of their own
                    heapq.heappush(waiting, (-source._sequence_nr(), count, source))
                reached.setdefault(source, set()).update(kinds)
    return max(found, key=int.bit_count, default=None)


def _operation(node: Any) -> str | int:
    name = node.name().rpartition("::")[2]
    if name in _COPIES:
        return "clone"
    match = _OPERATION.match(name)
    if match is None:
        return OPAQUE
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", match.group(1)).lower()
