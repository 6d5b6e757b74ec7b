"""Look at one captured graph: its sites, who keeps them, and what would be rewritten."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile.config import MHCConfig
from mhc_compile.hosts import HostedSite, Resolve, erase_markers, hosted_sites, marked_calls
from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.plan import Plan, plan_trunks
from mhc_compile.passes.residuals import Residuals, find_residuals

Refuse = Callable[[HostedSite], str | None]


@dataclass(slots=True)
class Analysis:
    """One canonicalized graph and everything known about it."""

    gm: GraphModule
    residuals: Residuals
    hosted: list[HostedSite]
    plan: Plan
    markers: dict[tuple[int, str], nn.Module] = field(default_factory=dict)
    """Calls of converted modules in this graph."""


def analyse(gm: GraphModule, resolve: Resolve, refuse: Callable[[list[HostedSite]], Mapping[int, str]]) -> Analysis:
    """Canonicalize ``gm`` in place, find its sites and plan their rewrite.

    Args:
        gm: a copy of a captured graph.
        resolve: modules of the graph's module calls.
        refuse: given all hosted sites, the ones to leave alone and why.
    """
    canonicalize_pass(gm, ())
    markers = marked_calls(gm.graph, resolve)
    erase_markers(gm.graph)
    residuals = find_residuals(gm.graph)
    hosted = hosted_sites(residuals, resolve)
    refused = {site.index: site.refusal for site in hosted if site.refusal}
    refused.update(refuse(hosted))
    return Analysis(gm, residuals, hosted, plan_trunks(gm.graph, residuals, refused), markers)


def filtered(name: str, config: MHCConfig) -> str | None:
    """Why the configuration leaves a site named ``name`` out, or None."""
    if config.streams == 1:
        return "streams=1 is the plain residual"
    if not any(fnmatchcase(name, pattern) for pattern in config.include):
        return f"no pattern of include={config.include} matches {name}"
    hit = next((pattern for pattern in config.exclude if fnmatchcase(name, pattern)), None)
    return f"excluded by {hit!r}" if hit is not None else None


def input_of(analysis: Analysis, trunk: int) -> Node | None:
    """The graph input a trunk starts from, if its entry is one."""
    origin = analysis.plan.trunks[trunk][0].site.origin
    return origin if origin.op == "placeholder" else None
