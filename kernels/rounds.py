"""How ``mhc::replay`` goes over many sites, whatever kernels it has: in rounds of `REPLAYED`."""

from collections.abc import Callable, Sequence

import torch

from mhc_compile.kernels.spec import REPLAYED

Round = Callable[[torch.Tensor, slice, slice], None]
"""Makes some states and branch inputs from the state before: that state, which states, which
branch inputs."""


def run_rounds(
    X: torch.Tensor, states: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], run: Round
) -> None:
    """Have ``run`` write all ``states`` and ``inputs``.

    Args:
        X: the state before the first site.
        states: room for the state of every site.
        inputs: room for as many branch inputs, or for one more, which is read out of ``X``.
        run: one round.
    """
    first, start = len(inputs) - len(states), X
    for at in range(0, max(1, len(states)), REPLAYED):
        made = slice(at, at + REPLAYED)
        # The branch inputs of these states, and before all of them that of X.
        run(start, made, slice(at + first if at else 0, at + first + REPLAYED))
        start = states[made][-1] if states else X


def by_turns(states: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What ``mhc::replay`` returns: the branch input of X, if there, then site by site."""
    first = len(inputs) - len(states)
    pairs = zip(states, inputs[first:], strict=True)
    return [*inputs[:first], *(tensor for pair in pairs for tensor in pair)]
