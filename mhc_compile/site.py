"""The parameters of one site, and what conversion recorded about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mhc_compile.kernels.spec import SiteSpec

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One residual add of an owner, in the order its forward reaches them."""

    key: str
    source: str
    """``file.py:123``: tells the site again after a graph break or in another mode."""
    converted: bool
    starts: bool
    """Whether some use starts a trunk."""
    follows: bool
    """Whether some use follows another site."""
    continues: bool
    """Whether another site follows some use."""
    ends: bool
    """Whether some use is the last of its trunk: the learned collapse reads its streams."""
    skip_at: int
    """Position of the skip among the leaves of the sum."""
    crosses: bool
    """Whether a graph break lay in its branch: this then reads the collapsed streams everywhere."""


class MHCSite(nn.Module):
    """Parameters of one residual site (see `mhc_compile.kernels.init.initial_parameters`).

    They stay float32 when the model is cast to bfloat16 or float16: the coefficients are computed
    in float32 anyway, and their gradients are small.

    Attributes:
        spec: streams, constraint and epsilons; its ``dim`` is set per graph.
        width: C.
        head: parameters of the learned collapse, on the last site of a trunk only.
    """

    bias: nn.Parameter

    def __init__(
        self,
        spec: SiteSpec,
        width: int,
        tensors: Mapping[str, torch.Tensor],
        head: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in head.items():
            self.register_parameter(f"head_{name}", nn.Parameter(tensor))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MHCSite":
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in _HALF else moved

        return super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        """Specification and width, as ``print(model)`` shows them."""
        return f"{self.spec.encode()}, width={self.width}"


class MHCSites(nn.ModuleDict):
    """``owner.mhc``: the sites of one owner by key, and what conversion recorded of its adds."""

    def __init__(
        self,
        sites: Mapping[str, MHCSite],
        records: tuple[SiteRecord, ...],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(dict(sites))
        self.records = records
        self.config = dict(config)
        self.signature = repr((records, sorted(self.config.items())))
        """All that is compiled into a graph beside the parameters: see `checked_class`."""

    def site(self, key: str) -> MHCSite:
        """One site, by the key of its record."""
        site = self[key]
        assert isinstance(site, MHCSite)
        return site
