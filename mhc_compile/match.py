"""Hold the sites of a captured graph against what conversion recorded.

Same site, same parameters: over recompiles, shapes, train and eval mode, and per-block compilation.
Fewer sites than recorded, or others, means the graph does not hold the network that was converted;
that is refused, never compiled as something else.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Protocol

from torch import nn

from mhc_compile.analysis import Analysis, refuse_filtered
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.hosts import HostedSite, MarkedCall
from mhc_compile.pieces import Piece
from mhc_compile.site import MHCSites, SiteRecord

SEEN = "_mhc_seen"
"""Attribute of every module below one that `convert_` was called on: what it left stays left."""
LEFT = "it was left as it is at conversion"
BROKEN = "a graph break splits the forward of its module"


def sites_of(module: nn.Module) -> MHCSites | None:
    """``module.mhc`` if it is ours."""
    found = module._modules.get("mhc")
    return found if isinstance(found, MHCSites) else None


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
        self._converted = any(SEEN in vars(module) for module in scope.modules.values())
        self._scope = scope
        self._names = scope.names
        self._config = config

    def refuse(self, hosted: Sequence[HostedSite]) -> dict[int, str]:
        """Match ``hosted`` against the records; the sites that stay plain adds, and why."""
        refused: dict[int, str] = {}
        calls: dict[tuple[int, str], list[HostedSite]] = defaultdict(list)
        for site in hosted:
            calls[id(site.host), site.call].append(site)
        for sites in calls.values():
            host = sites[0].host
            known = sites_of(host) if host is not None else None
            if known is None:
                refused.update(self._refuse_unknown(sites))
                continue
            aligned = _align(sites, known.records, is_whole=not self._is_cut(sites[0]))
            for site in sites:
                record = aligned.get(site.index)
                if record is not None and record.converted:
                    self.records[site.index] = record
                else:
                    refused[site.index] = LEFT
        return refused

    def starting(self) -> set[int]:
        """Sites that no other site led to at conversion: none may lead to them here."""
        return {index for index, record in self.records.items() if not record.follows}

    def _refuse_unknown(self, sites: Sequence[HostedSite]) -> dict[int, str]:
        """Sites of one call of a module without parameters: left, or new to us."""
        if self._converted:
            return {site.index: LEFT for site in sites}
        if self._is_cut(sites[0]):
            return {site.index: BROKEN for site in sites}
        return refuse_filtered(sites, self._config, self._names)

    def adopt(self, analysis: Analysis, sites_of: Callable[[nn.Module], MHCSites | None]) -> None:
        """Note the records of planned sites that were converted just now."""
        for planned in analysis.plan.sites:
            if planned.index not in self.records:
                sites = sites_of(analysis.host_of(planned))
                assert sites is not None, "a planned site has parameters"
                key = analysis.hosted[planned.index].key
                self.records[planned.index] = next(r for r in sites.records if r.key == key)

    def _is_cut(self, site: HostedSite) -> bool:
        """Whether a graph break may hide other adds of the call from this graph."""
        return self._scope.is_partial and site.call == ""

    def check(self, analysis: Analysis) -> Piece | None:
        """Compare sites and records of every call of a converted module in the graph.

        Returns:
            What the graph holds of a call that a graph break cuts; None if all its calls are whole.

        Raises:
            UnsupportedGraphError: a recorded site is not there, or cannot be rewritten as recorded.
        """
        found: dict[tuple[int, str], list[str]] = defaultdict(list)
        hosts = {key: call.host for key, call in analysis.calls.items()}
        for site in analysis.hosted:
            if site.index in self.records and site.host is not None:
                key = (id(site.host), site.call)
                hosts[key] = site.host
                found[key].append(self.records[site.index].key)
                self._refuse_unlike(site, analysis)
        collapsed = {index for index, record in self.records.items() if record.crosses}
        analysis.plan.collapse_branches(collapsed)
        piece = None
        for key, host in hosts.items():
            known = sites_of(host)
            expected = {r.key for r in known.records if r.converted} if known is not None else set()
            call = analysis.calls.get(key, MarkedCall(host))
            if call.begins and call.returns and expected == set(found[key]):
                continue
            is_cut = key[1] == "" and not (call.begins and call.returns)
            if known is None or not is_cut:
                raise UnsupportedGraphError(self._incomplete(host, expected - set(found[key])))
            piece = Piece(
                what=type(host).__name__,
                signature=known.signature,
                keys=frozenset(expected),
                here=tuple(found[key]),
                begins=call.begins,
                returns=call.returns,
            )
        return piece

    def _refuse_unlike(self, site: HostedSite, analysis: Analysis) -> None:
        """Make sure that a converted site can be rewritten here, and reads what it read before."""
        reason = analysis.plan.left.get(site.index)
        if reason is not None:
            raise UnsupportedGraphError(
                f"the converted site at {site.source} cannot be rewritten here: {reason}"
            )
        if analysis.residuals.sites[site.index].crosses and not self.records[site.index].crosses:
            raise UnsupportedGraphError(
                f"a graph break lies in the branch of the converted site at {site.source}, where "
                "none was at conversion: the branch would read other values than it was trained on "
                "(TORCH_LOGS=graph_breaks shows the break). Remove its cause, or "
                "mhc_compile.revert_(model) and convert as the model runs now, in "
                f"{'train' if site.host is not None and site.host.training else 'eval'} mode"
            )

    def _incomplete(self, host: nn.Module, missing: Set[str]) -> str:
        known = sites_of(host)
        records = known.records if known is not None else ()
        names = ", ".join(f"{r.key} ({r.source})" for r in records if r.key in missing)
        return (
            f"the graph of {self._scope.where} does not hold a whole call of the converted "
            f"{type(host).__name__}: "
            + (f"its sites {names} are" if names else "its sites are there, its call is")
            + " not. Either only a part of it was compiled, or it took another path than at "
            "conversion (a fused one: torch.backends.mha.set_fastpath_enabled(False); that of "
            f"{'train' if host.training else 'eval'} mode, in which it is now: convert it in that "
            "mode). Remove the cause, or convert with exclude=(...) for these sites"
        )


_AT_COMPILE = frozenset(
    {"inner", "overlap", "recompute", "seam_norm", "side_stream", "skip_passes"}
)
"""Options that say how a widened graph is compiled: they may differ from the conversion's."""


def settle_options(
    modules: Iterable[nn.Module], given: frozenset[str], config: MHCConfig
) -> MHCConfig:
    """What is in force for a graph: that of its conversion, but for options of compilation.

    Args:
        modules: those of the graph.
        given: names of the options that were given at compilation.
        config: these options, and defaults for the others.

    Raises:
        ConfigError: a given option contradicts the conversion; with both values.
    """
    known = map(sites_of, modules)
    converted = next((sites.config for sites in known if sites is not None), None)
    if converted is None:
        return config
    theirs = MHCConfig(**converted)
    for name in sorted(given - _AT_COMPILE):
        mine, there = getattr(config, name), getattr(theirs, name)
        if mine != there:
            raise ConfigError(
                f"{name}={mine!r} contradicts the conversion of this model, which had "
                f"{name}={there!r}: leave the option out, or mhc_compile.revert_(model) "
                "and convert again"
            )
    return replace(theirs, **{name: getattr(config, name) for name in given & _AT_COMPILE})


def _align(
    sites: Sequence[HostedSite], records: Sequence[SiteRecord], *, is_whole: bool
) -> dict[int, SiteRecord]:
    """Site index -> its record: by number in a whole call with all sites, else by source line.

    Lines alone would not do: torch.export reports other ones, and so does a module of torch itself
    when it is compiled alone.
    """
    if is_whole and len(sites) == len(records):
        return {site.index: record for site, record in zip(sites, records, strict=True)}
    aligned: dict[int, SiteRecord] = {}
    remaining = list(records)
    for site in sites:
        match = next((record for record in remaining if record.source == site.source), None)
        if match is not None:
            aligned[site.index] = match
            remaining = remaining[remaining.index(match) + 1 :]
    return aligned
