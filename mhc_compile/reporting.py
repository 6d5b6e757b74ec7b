"""Turn what was found into a `Report`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from torch import nn
from torch.fx import Node

from mhc_compile.analysis import matches
from mhc_compile.capture import Capture
from mhc_compile.config import MHCConfig
from mhc_compile.costs import activation_bytes, parameter_count, trunk_operations
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.owners import module_calls
from mhc_compile.passes.plan import Plan, PlannedSite
from mhc_compile.passes.reasons import ORIGIN
from mhc_compile.passes.sites import CROSSES, ResidualSite
from mhc_compile.passes.values import dims, dtype_of, source_line
from mhc_compile.report import HandWritten, RejectedAdd, Report, Site, Trunk
from mhc_compile.uses import SiteUse

_CHOICES = {
    "projection": "the skip is projected once, from the mean of the streams, and its result starts "
    "new ones: projecting every stream would cost n times as much",
    "slice": "the skip is cut from the mean of the streams and starts new ones: the branch reads "
    "more than this part, so that no streams of it could take its place",
    "joined": "the skip is put together from the means of several trunks and starts new streams: "
    "the branch reads those trunks apart",
    CROSSES: "the branch reads the mean of the streams, with no weights of its own: a graph break "
    "lies in it, and it begins before this site is known",
}
"""By form, or by a trait that goes first: what the rewrite does where it had a choice, and why."""

_SHOWN = 3
_BEHIND = ", as far as this side of a graph break shows (see the notes)"


def build_report(
    model: nn.Module,
    capture: Capture,
    config: MHCConfig,
    uses: Sequence[SiteUse],
    *,
    converted: bool,
) -> Report:
    """The report of a capture and the uses of its sites."""
    names = {id(module): name for name, module in model.named_modules()}
    return Report(
        model=type(model).__name__,
        config=asdict(config),
        graphs=capture.graphs,
        sites=tuple(_site(use, names, config, converted) for use in uses),
        trunks=_trunks(capture, uses, names, config.streams),
        rejected=_rejected(capture, names),
        chains=tuple(
            HandWritten(
                kind=chain.kind,
                source=chain.source,
                what=chain.what,
                operations=(chain.before, chain.after),
                reason=chain.reason,
            )
            for analysis in capture.runs
            for chain in analysis.chains
        ),
        notes=(*_notes(capture), *_idle_patterns(config, uses, names)),
    )


def _idle_patterns(
    config: MHCConfig, uses: Sequence[SiteUse], names: dict[int, str]
) -> Iterator[str]:
    """What is asked for in vain: most likely a name that is spelled in another way."""
    sites = [(use.hosted.name(names), use.hosted.kinds) for use in uses]
    for field in ("include", "exclude"):
        for pattern in getattr(config, f"{field}_patterns"):
            if sites and not any(matches(pattern, *site) for site in sites):
                shown = ", ".join(name for name, _ in sites[:_SHOWN])
                yield f"{field}: {pattern!r} matches none of the {len(sites)} sites ({shown}, ...)"


def _site(use: SiteUse, names: dict[int, str], config: MHCConfig, converted: bool) -> Site:
    planned, spec = use.planned, config.spec()
    found = "converted" if converted else "found"
    return Site(
        name=use.hosted.name(names),
        owner=names.get(id(use.hosted.host), ""),
        key=use.hosted.key,
        form=use.site.form,
        traits=use.site.traits,
        source=use.hosted.source,
        shape=_shape(use.site.root),
        dtype=str(dtype_of(use.site.root)).removeprefix("torch."),
        trunk=use.trunk,
        status="left" if planned is None else found,  # type: ignore[arg-type]
        reason=use.reason,
        parameters=0 if planned is None else parameter_count(spec, planned.width),
        activation_bytes=0 if planned is None else activation_bytes(planned, spec),
        choice="" if planned is None else _choice(use.site),
    )


def _choice(site: ResidualSite) -> str:
    return _CHOICES.get(CROSSES if site.crosses else site.form, "")


def _trunks(
    capture: Capture, uses: Sequence[SiteUse], names: dict[int, str], streams: int
) -> tuple[Trunk, ...]:
    members: dict[int, list[SiteUse]] = defaultdict(list)
    for use in uses:
        if use.planned is not None:
            members[use.trunk].append(use)
    readers = [_readers(analysis.plan) for analysis in capture.runs]
    return tuple(
        Trunk(
            index=index,
            sites=tuple(use.hosted.name(names) for use in group),
            width=_planned(group[0]).width,
            entry=_entry(group[0]),
            readers=sum(readers[use.run][use.hosted.index] for use in group),
            on_trunk=trunk_operations(map(_planned, group), streams),
        )
        for index, group in sorted(members.items())
    )


def _planned(use: SiteUse) -> PlannedSite:
    assert use.planned is not None
    return use.planned


def _entry(use: SiteUse) -> str:
    start = _planned(use).start
    if start.op == "placeholder":
        return "graph input"
    return op_name(start) or start.op


def _readers(plan: Plan) -> dict[int, int]:
    """How many operations outside branches and trunk read the trunk at each site, by index."""
    inner: set[Node] = set()
    branches: dict[Node, list[frozenset[Node]]] = defaultdict(list)
    for p in plan.sites:
        inner.update((p.site.root, *p.site.inner, *p.site.skip_path, *p.region))
        branches[p.start].append(p.branch)
    return {
        p.index: sum(
            user not in inner and not any(user in branch for branch in branches[value])
            for value in (p.site.root, *p.region)
            for user in value.users
        )
        for p in plan.sites
    }


def _rejected(capture: Capture, names: dict[int, str]) -> tuple[RejectedAdd, ...]:
    return tuple(
        RejectedAdd(
            source=source_line(rejected.root),
            owner=_owner(rejected.root, names),
            shape=_shape(rejected.root),
            clause=rejected.clause,
            reason=rejected.reason + _BEHIND * (analysis.is_partial and rejected.clause == ORIGIN),
        )
        for analysis in capture.runs
        for rejected in analysis.residuals.rejected
    )


def _owner(node: Node, names: dict[int, str]) -> str:
    module = module_calls(node)[-1].module
    return names.get(int(module), "") if module.isdecimal() else module


def _shape(node: Node) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in dims(node))


def _notes(capture: Capture) -> tuple[str, ...]:
    notes = []
    if capture.graphs > 1:
        notes.append(
            f"the model was captured as {capture.graphs} graphs; trunks are carried from one to "
            "the next. A residual whose branch runs through a graph break is found by its "
            "gradients, which a call under torch.no_grad() does not have, and not in a function "
            "that Dynamo leaves to Python altogether (a break in a loop)"
        )
    for place, times in Counter(capture.breaks).items():
        often = f" ({times} times)" if times > 1 else ""
        notes.append(f"graph break at {place.source}{often}: {place.reason}")
    return tuple(notes)
