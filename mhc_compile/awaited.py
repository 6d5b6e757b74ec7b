"""Inputs of a compiled graph that are collectives on their way.

Eager DTensor code (an embedding outside of the compiled layers, split by tokens) returns an
``AsyncCollectiveTensor``, which waits when it is used. Of such an input AOTAutograd takes the inner
tensor, which knows no gradient: what was computed before the collective would not be trained. So
they are awaited on this side of the graph, by an operation that autograd sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from mhc_compile._torch_private import Compiled, fake_like, is_pending, without_tracing


class _Wait(torch.autograd.Function):
    """The result of a collective; its gradient goes back as it is."""

    @staticmethod
    def forward(ctx: Any, pending: Any) -> torch.Tensor:
        result: torch.Tensor = pending.trigger_wait()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def awaited_examples(placeholders: Sequence[Node], examples: Sequence[Any]) -> list[Any]:
    """``examples`` of a graph's inputs, with fake plain tensors for collectives on their way."""
    return [
        fake_like(node.meta["example_value"], example.shape) if is_pending(example) else example
        for node, example in zip(placeholders, examples, strict=True)
    ]


def await_inputs(compiled: Compiled, examples: Sequence[Any]) -> Compiled:
    """``compiled``, called with collectives awaited; the same if no example is one."""
    if not any(is_pending(example) for example in examples):
        return compiled

    @without_tracing
    def call(*args: Any) -> Any:
        return compiled(*(_Wait.apply(a) if is_pending(a) else a for a in args))  # type: ignore[no-untyped-call]

    return call
