"""Who knows what happened between the inputs of a graph: autograd at conversion, records later."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from mhc_compile._torch_private import OPAQUE, kinds_between
from mhc_compile.match import sites_of
from mhc_compile.passes.outside import Ask
from mhc_compile.passes.owners import ROOT, module_calls
from mhc_compile.passes.sums import SumTree
from mhc_compile.passes.values import source_line
from mhc_compile.passes.vocabulary import BENDS, MIXES, traits_of

Answers = tuple[tuple[tuple[int, int], int | None], ...]
"""(number of the later input, of the earlier one) -> what lies between, see `Ask`."""


class Autograd:
    """What the gradients tell of the values that a graph is called with.

    Without gradients (``torch.no_grad()``, a frozen trunk) they tell nothing.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        """Names of the graph's inputs, in their order."""
        self.values: Sequence[Any] = ()
        """What the graph is called with: to be set before anybody asks."""
        self._position = {name: number for number, name in enumerate(inputs)}
        self._asked: dict[tuple[int, int], None] = {}

    def ask(self, tree: SumTree, number: int, later: Node, earlier: Node) -> int | None:
        """An `Ask`."""
        pair = self._position[later.name], self._position[earlier.name]
        self._asked[pair] = None
        return self._answer(pair, self.values)

    def answers(self, values: Sequence[Any]) -> Answers:
        """All that was asked so far, answered for a call with ``values``."""
        return tuple((pair, self._answer(pair, values)) for pair in self._asked)

    def _answer(self, pair: tuple[int, int], values: Sequence[Any]) -> int | None:
        later, earlier = values[pair[0]], values[pair[1]]
        if not (isinstance(later, torch.Tensor) and isinstance(earlier, torch.Tensor)):
            return None
        return kinds_between(later, earlier, _kind_of)


def _kind_of(operation: str | int) -> int:
    if operation == OPAQUE:
        return MIXES | BENDS
    return traits_of(str(operation)) | traits_of(f"_{operation}")


def ask_records(root: nn.Module | None) -> Ask | None:
    """What conversion noted of the adds in the forward of ``root``."""
    known = sites_of(root) if root is not None else None
    if known is None:
        return None
    skips = {(r.source, r.skip_at) for r in known.records if r.converted}

    def ask(tree: SumTree, number: int, later: Node, earlier: Node) -> int | None:
        is_own = module_calls(tree.root)[-1] == ROOT
        is_site = is_own and (source_line(tree.root), number) in skips
        return MIXES | BENDS if is_site else None

    return ask
