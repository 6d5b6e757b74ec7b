"""Small random-weight builds of public model definitions, whose residual sites are known.

`truth.json` says how many sites each has and how they chain. Sizes differ from stack to stack, so
that a wrong count shows. Nothing is downloaded.
"""

import torch
from torch import nn

from tests.models import zoo_diffusers, zoo_perception, zoo_text, zoo_timm  # noqa: F401
from tests.models.zoo_base import BUILDERS, LIBRARIES, Inputs

__all__ = ["BUILDERS", "LIBRARIES", "Inputs", "build"]


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode and its keyword arguments, the same on every call."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    return model.eval(), inputs
