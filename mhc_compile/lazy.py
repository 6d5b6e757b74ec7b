"""Convert a model on its first call, for those who only write ``torch.compile``."""

import warnings

from mhc_compile._torch_private import Frame
from mhc_compile.analysis import Analysis
from mhc_compile.config import MHCConfig
from mhc_compile.convert import attach_
from mhc_compile.errors import ConfigError, MHCWarning
from mhc_compile.match import new_records, sites_of
from mhc_compile.site import SiteRecord
from mhc_compile.uses import first_uses


def convert_now(analysis: Analysis, frame: Frame, config: MHCConfig) -> dict[int, SiteRecord]:
    """Attach parameters for everything planned in a graph no module of which was ever converted.

    Returns:
        The records of the planned sites, by site index.

    Raises:
        ConfigError: ``collapse="learned"`` where the end of a trunk is not in the graph.
        UnsupportedGraphError: as `attach_` raises it.
    """
    if not analysis.plan.sites:
        if not analysis.residuals.sites:
            return {}
        attach_(first_uses(analysis), config)  # so that the next graph of this model is not new
        return {}
    if config.collapse == "learned" and any(analysis.plan.departures):
        raise ConfigError(
            "collapse='learned' belongs to the last site of a trunk, and this graph does not "
            "show whether its trunk "
            "ends: convert with mhc_compile.convert_(model, ...) before compiling"
        )
    attach_(first_uses(analysis), config)
    model = type(frame.root).__name__ if frame.root is not None else frame.where
    warnings.warn(
        f"{model} was converted to {config.streams} residual streams on its first call: "
        f"{len(analysis.plan.sites)} sites in {len(analysis.plan.trunks)} trunks. An optimizer, "
        "DDP or FSDP wrapper made "
        "before this call does not know the new parameters: call mhc_compile.convert_(model, "
        "...) first",
        MHCWarning,
        stacklevel=2,
    )
    return new_records(analysis, sites_of)
