"""Hold the sites of a captured graph against what conversion recorded.

Same site, same parameters: over recompiles, shapes, train and eval mode, and per-block compilation.
Fewer sites than recorded, or others, means the graph does not hold the network that was converted;
that is refused, never compiled as something else.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Protocol

from torch import nn

from mhc_compile.analysis import Analysis, filtered
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.hosts import HostedSite
from mhc_compile.site import MHCSite, MHCSites, SiteRecord

SEEN = "_mhc_seen"
"""Attribute of every module whose adds conversion looked at, converted or not."""


def sites_of(module: nn.Module) -> MHCSites | None:
    """``module.mhc`` if it is ours."""
    found = module._modules.get("mhc")
    return found if isinstance(found, MHCSites) else None


def site_named(sites: MHCSites, key: str) -> MHCSite:
    """One site of a host."""
    site = sites[key]
    assert isinstance(site, MHCSite)
    return site


def record_start(sites: MHCSites, key: str, *, starts: bool) -> SiteRecord:
    """Note what the first call of a lazily converted site showed: does its trunk start there."""
    records = list(sites.records)
    number = next(i for i, record in enumerate(records) if record.key == key)
    records[number] = replace(records[number], starts=starts, follows=not starts)
    sites.records = tuple(records)
    return records[number]


def new_records(
    analysis: Analysis, sites_of: Callable[[nn.Module], MHCSites | None]
) -> dict[int, SiteRecord]:
    """The records of the planned sites of a graph that was converted just now, by site index."""
    records = {}
    for planned in analysis.plan.sites:
        hosted = analysis.hosted[planned.index]
        sites = sites_of(hosted.host) if hosted.host is not None else None
        assert sites is not None
        records[planned.index] = next(r for r in sites.records if r.key == hosted.key)
    return records


class Scope(Protocol):
    """Where a graph comes from: a frame of Dynamo's, or an exported program."""

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        """All modules in reach, by ``id``."""

    @property
    def names(self) -> Mapping[int, str]:
        """Their paths."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def is_partial(self) -> bool:
        """Whether the graph is only a part of its function."""


class Matches:
    """The records of one graph's sites, by position in `Residuals.sites`."""

    def __init__(self, scope: Scope, config: MHCConfig) -> None:
        self.records: dict[int, SiteRecord] = {}
        self.is_new = not any(SEEN in vars(module) for module in scope.modules.values())
        """Whether conversion has never seen any module of this graph."""
        self._scope = scope
        self._config = config

    def refuse(self, hosted: Sequence[HostedSite]) -> dict[int, str]:
        """Match ``hosted`` against the records; the sites that stay plain adds, and why."""
        if self.is_new:
            return self._refuse_new(hosted)
        refused: dict[int, str] = {}
        calls: dict[tuple[int, str], list[HostedSite]] = defaultdict(list)
        for site in hosted:
            calls[id(site.host), site.call].append(site)
        for sites in calls.values():
            host = sites[0].host
            known = sites_of(host) if host is not None else None
            aligned = _align(sites, known.records) if known is not None else {}
            for site in sites:
                record = aligned.get(site.index)
                if record is not None and record.converted:
                    self.records[site.index] = record
                elif not site.refusal:
                    refused[site.index] = "it was left as it is at conversion"
        return refused

    def _refuse_new(self, hosted: Sequence[HostedSite]) -> dict[int, str]:
        if self._scope.is_partial and any(site.call == "" for site in hosted):
            raise UnsupportedGraphError(
                f"a graph break splits {self._scope.where}, which adds residuals: its streams "
                "cannot be followed on a "
                "first call. Remove the break (TORCH_LOGS=graph_breaks shows it), or call "
                "mhc_compile.convert_ first, "
                "which leaves such sites as they are and says so"
            )
        names = self._scope.names
        refused = {}
        for site in hosted:
            if site.host is not None:
                name = f"{names.get(id(site.host), '')}.{site.key}".lstrip(".")
                reason = filtered(name, self._config)
                if reason is not None:
                    refused[site.index] = reason
        return refused

    def check(self, analysis: Analysis) -> None:
        """Compare sites and records of every call of a converted module in the graph.

        Raises:
            UnsupportedGraphError: a call has no marker, or its recorded sites are not all there.
        """
        found: dict[tuple[int, str], set[str]] = defaultdict(set)
        hosts = dict(analysis.markers)
        for site in analysis.hosted:
            if site.index in self.records and site.host is not None:
                key = (id(site.host), site.call)
                hosts[key] = site.host
                found[key].add(self.records[site.index].key)
                reason = analysis.plan.left.get(site.index)
                if reason is not None:
                    raise UnsupportedGraphError(
                        f"the converted site at {site.source} cannot be rewritten here: {reason}"
                    )
        for key, host in hosts.items():
            known = sites_of(host)
            expected = {r.key for r in known.records if r.converted} if known is not None else set()
            if expected == found[key] and key in analysis.markers:
                continue
            missing = ", ".join(
                f"{r.key} ({r.source})"
                for r in (known.records if known else ())
                if r.key in expected - found[key]
            )
            raise UnsupportedGraphError(
                f"the graph of {self._scope.where} does not hold a whole call of the converted "
                f"{type(host).__name__}: "
                + (f"its sites {missing} are" if missing else "its sites are there, its call is")
                + " not. A graph break inside its forward cuts the trunk (TORCH_LOGS=graph_breaks "
                "shows it), or only a part of a site was compiled. Compile the module that holds "
                "both sides of the add, remove the break, or convert with exclude=(...) for these"
            )


def check_options(analysis: Analysis, given: frozenset[str], config: MHCConfig) -> None:
    """Refuse options that contradict the conversion.

    Raises:
        ConfigError: with both values.
    """
    mine = asdict(config)
    hosts = (site.host for site in analysis.hosted)
    known = (sites_of(host) for host in hosts if host is not None)
    converted = next((sites.config for sites in known if sites is not None), None)
    if converted is None:
        return
    for name in sorted(given - {"inner", "on_eager"}):
        if mine[name] != converted[name]:
            raise ConfigError(
                f"{name}={mine[name]!r} contradicts the conversion of this model, which had "
                f"{name}={converted[name]!r}: "
                "leave the option out, or mhc_compile.revert_(model) and convert again"
            )


def _align(sites: Sequence[HostedSite], records: Sequence[SiteRecord]) -> dict[int, SiteRecord]:
    """Site index -> its record: by number where all agree, else by source line in order.

    Export shows an add in a called function at the line of the call: where no line is known from
    conversion, only the number can tell.
    """
    known = {record.source for record in records}
    comparable = any(site.source in known for site in sites)
    if len(sites) == len(records) and all(
        s.source == r.source or not comparable for s, r in zip(sites, records, strict=True)
    ):
        return {site.index: record for site, record in zip(sites, records, strict=True)}
    aligned: dict[int, SiteRecord] = {}
    remaining = list(records)
    for site in sites:
        match = next((record for record in remaining if record.source == site.source), None)
        if match is not None:
            aligned[site.index] = match
            remaining = remaining[remaining.index(match) + 1 :]
    return aligned
