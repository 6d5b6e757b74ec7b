"""Look at one captured graph: its sites, who keeps them, and what would be rewritten."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import GraphModule

from mhc_compile.config import FORM, MHCConfig
from mhc_compile.hosts import (
    HostedSite,
    MarkedCall,
    NumberOf,
    Resolve,
    erase_markers,
    hosted_sites,
    marked_calls,
)
from mhc_compile.passes.chains import Chain
from mhc_compile.passes.origins import part_origins
from mhc_compile.passes.outside import Ask
from mhc_compile.passes.plan import Plan, PlannedSite, plan_trunks
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.sites import Residuals
from mhc_compile.pipeline import Observer, canonical_passes, run_passes

Refuse = Callable[[list[HostedSite]], Mapping[int, str]]
Starting = Callable[[], Container[int]]


@dataclass(slots=True)
class Analysis:
    """One canonicalized graph and everything known about it."""

    gm: GraphModule
    residuals: Residuals
    hosted: list[HostedSite]
    plan: Plan
    calls: dict[tuple[int, str], MarkedCall] = field(default_factory=dict)
    """Calls of converted modules in this graph."""
    chains: list[Chain] = field(default_factory=list)
    """Hand-written hyper-connections: those that are mhc ops now, and those that stay."""
    is_partial: bool = False
    """Whether a graph break makes the graph only a part of its function."""
    single_pass: bool = False
    """Whether sites are to read by the weights of the site before, see `plan_trunks`."""

    def host_of(self, planned: PlannedSite) -> nn.Module:
        """The module that keeps a planned site."""
        host = self.hosted[planned.index].host
        assert host is not None, "a site without a host is refused before planning"
        return host


def analyse(
    gm: GraphModule,
    resolve: Resolve,
    refuse: Refuse,
    observe: Observer | None = None,
    *,
    kernels: str = "auto",
    ask: Ask | None = None,
    number_of: NumberOf | None = None,
    starting: Starting = tuple,
    single_pass: bool = False,
) -> Analysis:
    """Canonicalize ``gm`` in place, find its sites and plan their rewrite.

    Hyper-connections that the model has of its own are mhc ops afterwards.

    Args:
        gm: a copy of a captured graph.
        resolve: modules of the graph's module calls.
        refuse: given all hosted sites, the ones to leave alone and why.
        observe: sees the graph as captured ("before"), and after each change.
        kernels: what computes the ops in the place of hand-written hyper-connections.
        ask: who knows what happened between the inputs of the graph before it ran.
        number_of: see `hosted_sites`.
        starting: asked after ``refuse``: indices of sites that start streams of their own.
        single_pass: as in `MHCConfig`; the plan depends on it.
    """
    if observe is not None:
        observe("before", gm)
    chains: list[Chain] = []
    run_passes(gm, (), canonical_passes(kernels, chains), observe)
    calls = marked_calls(gm.graph, resolve)
    erase_markers(gm.graph)
    gm.recompile()
    residuals = find_residuals(gm.graph, ask)
    while part_origins(gm.graph, residuals):
        gm.recompile()
        residuals = find_residuals(gm.graph, ask)
    hosted = hosted_sites(residuals, resolve, number_of)
    analysis = Analysis(gm, residuals, hosted, Plan(), calls, chains, single_pass=single_pass)
    return _planned(analysis, refuse, starting)


def for_hosts(analysis: Analysis, hosted: list[HostedSite], refuse: Refuse) -> Analysis:
    """The analysis of the same graph when it runs for other modules."""
    return _planned(replace(analysis, hosted=hosted), refuse)


def _planned(analysis: Analysis, refuse: Refuse, starting: Starting = tuple) -> Analysis:
    refused = dict(refuse(analysis.hosted))
    refused.update({site.index: site.refusal for site in analysis.hosted if site.refusal})
    plan = plan_trunks(
        analysis.gm.graph,
        analysis.residuals,
        refused,
        starting(),
        single_pass=analysis.single_pass,
    )
    return replace(analysis, plan=plan)


def refuse_filtered(
    hosted: Sequence[HostedSite], config: MHCConfig, names: Mapping[int, str]
) -> dict[int, str]:
    """The sites that the configuration leaves out, by index, and why.

    Args:
        hosted: sites of one graph.
        config: its ``streams``, ``include`` and ``exclude`` count.
        names: path of each module, by ``id``.
    """
    reasons = {site.index: _filtered(site.name(names), site.kinds, config) for site in hosted}
    return {index: reason for index, reason in reasons.items() if reason is not None}


def _filtered(name: str, kinds: Sequence[str], config: MHCConfig) -> str | None:
    """Why the configuration leaves out a site of that name, form and traits, or None."""
    if config.streams == 1:
        return "streams=1 is the plain residual"
    if not any(matches(pattern, name, kinds) for pattern in config.include_patterns):
        return f"no pattern of include={config.include} matches {name} ({', '.join(kinds)})"
    hit = next((p for p in config.exclude_patterns if matches(p, name, kinds)), None)
    return f"excluded by {hit!r}" if hit is not None else None


def matches(pattern: str, name: str, kinds: Sequence[str]) -> bool:
    """Whether a pattern of names, or one of forms and traits (``form:``), fits a site."""
    if not pattern.startswith(FORM):
        return fnmatchcase(name, pattern)
    return any(fnmatchcase(kind, pattern.removeprefix(FORM)) for kind in kinds)
