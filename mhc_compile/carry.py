"""Carry the n-stream state from one compiled graph to the next.

Compiled block by block, or cut by a graph break, a trunk crosses the boundary as one plain tensor.
The state travels with it: it hangs on the Python object of that tensor's storage, which every alias
shares and which lives as long as the storage does. It is taken only by a tensor that shows the same
values and the same gradient path; anything else (a copy, a ``detach``, an in-place write) is a
miss.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Autograd nodes that hand their gradient on as it is: FSDP2's and a plain alias.
_IDENTITY = frozenset({"RegisterPostBackwardFunctionBackward", "AliasBackward0"})


class _Tie(torch.autograd.Function):
    """The state, with a zero gradient for the tensor it came with.

    Autograd nodes on that tensor (FSDP2's, for one) then still run in their turn.
    """

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        ctx.like = visible.shape, visible.dtype, visible.device
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros((), dtype=dtype, device=device).expand(shape)


@dataclass(slots=True)
class _Cell:
    state: Any
    dim: int
    version: int
    geometry: tuple[Any, ...]
    grad_fn: Any
    output_nr: int


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def put(visible: torch.Tensor, state: Any, dim: int) -> None:
    """Let ``state`` travel with ``visible``, its collapsed form.

    Args:
        visible: what the next graph gets.
        state: the streams, in a tuple with what else their next reader needs; or any note.
        dim: channel axis.
    """
    visible.untyped_storage()._mhc = _Cell(  # type: ignore[attr-defined]
        state, dim, _version(visible), _geometry(visible), visible.grad_fn, visible.output_nr
    )


def get(visible: torch.Tensor, dim: int) -> Any:
    """The state that travels with ``visible``; None where there is none, or it is stale."""
    cell = getattr(visible.untyped_storage(), "_mhc", None)
    if cell is None or (cell.version, cell.geometry, cell.dim) != (
        _version(visible),
        _geometry(visible),
        dim,
    ):
        return None
    if not torch.is_grad_enabled():
        return cell.state
    # Only identity nodes may lie between the two, or X would bypass what the user did to the
    # gradient.
    node, number = visible.grad_fn, visible.output_nr
    while node is not cell.grad_fn and node is not None and node.name() in _IDENTITY:
        node, number = [edge for edge in node.next_functions if edge[0] is not None][number]
    if node is not cell.grad_fn or (node is not None and number != cell.output_nr):
        return None
    if node is None:
        return None if visible.requires_grad else cell.state
    if not isinstance(cell.state, tuple):
        return cell.state
    state, *gates = cell.state
    return _Tie.apply(state, visible), *gates  # type: ignore[no-untyped-call]
