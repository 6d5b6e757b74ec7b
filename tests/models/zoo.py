"""Small random-weight builds of public model definitions, whose residual sites are known.

`truth.json` says how many sites each has and how they chain. Sizes differ from stack to stack, so
that a wrong count shows. Nothing is downloaded.
"""

import torch
from torch import nn

from tests.models import (  # noqa: F401
    zoo_diffusers,
    zoo_held_out,
    zoo_later_perception,
    zoo_later_text,
    zoo_perception,
    zoo_text,
    zoo_timm,
)
from tests.models.zoo_base import BUILDERS, LIBRARIES, Inputs

__all__ = ["BUILDERS", "LIBRARIES", "Inputs", "build"]


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode and its keyword arguments, the same on every call."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    _settle(model, inputs)
    return model.eval(), inputs


def _settle(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms the statistics of the inputs.

    With those that they start from, nothing is normalised in eval mode, and a deep network with
    small random weights computes 0.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not any(norm.track_running_stats for norm in norms):
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
