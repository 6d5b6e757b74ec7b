"""Results as tables: what the command line shows, before anything decides how it looks.

`mhc_compile.render` draws a `Table` on a terminal; `to_text` writes it for files and pipes, with
the same bytes for the same report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.memory import MemoryPlan
from mhc_compile.report import Report, Site, TrunkOperation
from mhc_compile.stages import Stage, count_changes

if TYPE_CHECKING:  # verify compiles, and the backend writes dumps with tables
    from mhc_compile.passes.simulate import Timeline
    from mhc_compile.stability import Mixing, StabilityReport
    from mhc_compile.stream_report import GraphStreams, StreamReport
    from mhc_compile.verify import VerifyReport

_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A title, the names of the columns, and rows of texts of that length."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary_line(report: Report) -> str:
    """One sentence: how many sites and trunks, and what was not taken."""
    taken, left = report.converted, report.left
    verb = "converted" if any(site.status == "converted" for site in taken) else "found"
    text = (
        f"{report.model}: {count(len(taken), 'residual site')} {verb} "
        f"in {count(len(report.trunks), 'trunk')}"
    )
    if left:
        text += f", {len(left)} left as {'it was' if len(left) == 1 else 'they were'}"
    text += f", {count(len(report.rejected), 'other add')}, {count(report.graphs, 'graph')}"
    replaced = [chain for chain in report.chains if not chain.reason]
    if replaced:
        before, after = (sum(chain.operations[k] for chain in replaced) for k in (0, 1))
        pieces = count(len(replaced), "hand-written piece")
        text += f", {pieces} of hyper-connections replaced ({before} -> {after} operations)"
    parameters = sum(
        {site.name: site.parameters for site in taken}.values()
    )  # shared layers repeat
    return f"{text}, {parameters:,} new parameters" if parameters else text


def report_tables(report: Report, *, every_add: bool = False) -> list[Table]:
    """The tables of a report: trunks, sites, hand-written hyper-connections, other adds.

    Args:
        report: what `mhc_compile.explain` or `mhc_compile.convert_` returned.
        every_add: list each rejected add, instead of a count and examples for each clause.
    """
    tables = [_trunks(report), _sites(report.sites), _chains(report), _rejected(report, every_add)]
    return [table for table in tables if table.rows]


def report_text(report: Report) -> str:
    """The whole report as plain text: summary, tables, notes."""
    parts = [summary_line(report), *map(to_text, report_tables(report, every_add=True))]
    parts += [f"note: {note}" for note in report.notes]
    return "\n\n".join(parts) + "\n"


def to_text(table: Table) -> str:
    """The table in aligned columns, without colours or lines; no trailing newline."""
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (table.columns, *table.rows)
    ]
    return "\n".join([table.title, *lines])


def count(number: int, noun: str) -> str:
    """``"1 site"``, ``"12 sites"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _trunks(report: Report) -> Table:
    rows = [
        (
            str(trunk.index),
            str(len(trunk.sites)),
            str(trunk.width),
            trunk.entry,
            str(trunk.readers),
            ", ".join(_operation(operation) for operation in trunk.on_trunk),
            _span(trunk.sites),
        )
        for trunk in report.trunks
    ]
    columns = ("trunk", "sites", "width", "entry", "readers", "on the trunk", "from .. to")
    return Table(title="Trunks", columns=columns, rows=tuple(rows))


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _operation(operation: TrunkOperation) -> str:
    """``layer_norm x3 (+12,288 B)``: how often, and what the further streams write."""
    cost = "dynamic" if operation.extra_bytes is None else f"+{operation.extra_bytes:,} B"
    return f"{operation.name} x{operation.count} ({cost})"


def _sites(sites: Sequence[Site]) -> Table:
    rows = [
        (
            site.name,
            site.form,
            ", ".join(site.traits),
            site.source,
            _shape(site.shape),
            "" if site.trunk < 0 else str(site.trunk),
            *_costs(site),
            f"left: {site.reason}" if site.status == "left" else _status(site),
        )
        for site in sites
    ]
    columns = (
        *("site", "form", "traits", "source", "shape", "trunk", "parameters", "extra bytes"),
        "status",
    )
    return Table(title="Residual sites", columns=columns, rows=tuple(rows))


def _costs(site: Site) -> tuple[str, str]:
    if site.status == "left":
        return "", ""
    extra = site.activation_bytes
    return f"{site.parameters:,}", "dynamic" if extra is None else f"{extra:,}"


def _status(site: Site) -> str:
    return f"{site.status}: {site.choice}" if site.choice else site.status


def _chains(report: Report) -> Table:
    rows = [
        (
            chain.kind,
            chain.source,
            chain.what,
            "" if chain.reason else "{} -> {}".format(*chain.operations),
            f"left: {chain.reason}" if chain.reason else "replaced",
        )
        for chain in report.chains
    ]
    columns = ("piece", "source", "constants", "operations", "status")
    return Table(title="Hand-written hyper-connections", columns=columns, rows=tuple(rows))


def _rejected(report: Report, every_add: bool) -> Table:
    title = "Adds that are no residual"
    if every_add:
        return Table(
            title=title,
            columns=("source", "module", "shape", "clause", "reason"),
            rows=tuple(
                (add.source, add.owner, _shape(add.shape), add.clause, add.reason)
                for add in report.rejected
            ),
        )
    groups: dict[str, list[int]] = {}
    for index, add in enumerate(report.rejected):
        groups.setdefault(add.clause, []).append(index)
    rows = []
    for clause, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        # dict.fromkeys: a line that runs in every layer is one example
        sources = list(dict.fromkeys(report.rejected[index].source for index in members))
        shown = ", ".join(sources[:_EXAMPLES]) + (", ..." if len(sources) > _EXAMPLES else "")
        rows.append((clause, str(len(members)), shown, report.rejected[members[0]].reason))
    columns = ("clause", "adds", "for example", "reason of the first")
    return Table(title=title, columns=columns, rows=tuple(rows))


def _shape(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape))


def stage_table(stages: Sequence[Stage]) -> Table:
    """How many operations each pass left, and which counts it changed."""
    rows = []
    for before, stage in zip([None, *stages], stages, strict=False):
        changed = {} if before is None else count_changes(before.counts, stage.counts)
        text = ", ".join(f"{name}: {old} → {new}" for name, (old, new) in changed.items())
        rows.append((stage.stem, f"{sum(stage.counts.values()):,}", text))
    columns = ("stage", "operations", "changed")
    return Table(title="Operations after each pass", columns=columns, rows=tuple(rows))


def byte_table(traffic: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes of the mhc ops of a forward graph, as `mhc_compile.graph_text.traffic` counts them."""

    def text(number: int | None) -> str:
        return "depends on a size" if number is None else f"{number:,}"

    rows = [
        (row["op"], str(row["calls"]), text(row["read"]), text(row["written"])) for row in traffic
    ]
    columns = ("op", "calls", "bytes read", "bytes written")
    return Table(title="Bytes of the mhc ops, forward", columns=columns, rows=tuple(rows))


def stability_tables(report: "StabilityReport") -> list[Table]:
    """Gains of whole trunks, gains of each site, and the effective mixing of each site."""
    columns = ("forward", "backward", "row sums - 1", "column sums - 1", "smallest", "diagonal")

    def cells(mixing: "Mixing") -> tuple[str, ...]:
        gains = (mixing.forward_gain, mixing.backward_gain)
        errors = (mixing.row_error, mixing.column_error)
        rest = (mixing.smallest, mixing.diagonal)
        return (*(f"{x:.4f}" for x in gains), *(f"{x:.1e}" for x in errors),
                *(f"{x:.3f}" for x in rest))  # fmt: skip

    trunks = [
        (str(t.index), str(t.sites), *cells(t.composite), f"{t.spread:.4f}") for t in report.trunks
    ]
    sites = [(s.name, str(s.trunk), *cells(s.mixing), f"{s.spread:.4f}") for s in report.sites]
    matrices = [
        (
            s.name,
            "  ".join("[" + " ".join(f"{x:.2f}" for x in row) + "]" for row in s.mixing.matrix),
        )
        for s in report.sites
    ]
    return [
        Table(
            title="Gains of whole trunks",
            columns=("trunk", "sites", *columns, "spread"),
            rows=tuple(trunks),
        ),
        Table(
            title="Gains of sites", columns=("site", "trunk", *columns, "spread"), rows=tuple(sites)
        ),
        Table(title="Effective H_res, by rows", columns=("site", "matrix"), rows=tuple(matrices)),
    ]


def memory_tables(plan: MemoryPlan) -> list[Table]:
    """What `mhc_compile.memory.memory_plan` found, in MiB."""
    rows = [
        (
            str(trunk.index),
            str(trunk.sites),
            f"{trunk.blocks} of {trunk.block}" if trunk.block else "none",
            *(
                _mebibytes(size)
                for size in (
                    trunk.states,
                    trunk.branches,
                    trunk.mappings,
                    trunk.kept,
                    trunk.peak,
                    trunk.without,
                )
            ),
            f"{trunk.rows} rows",
        )
        for trunk in plan.trunks
    ]
    columns = (
        "trunk", "sites", "blocks", "states", "branch outputs", "mappings at most", "kept", "peak",
        "kept without", "replayed",
    )  # fmt: skip
    title = f"Kept for the backward beside the branches' own, MiB (recompute={plan.recompute})"
    return [Table(title=title, columns=columns, rows=tuple(rows))] if rows else []


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f}"


def stream_tables(report: "StreamReport") -> list[Table]:
    """What two streams are predicted to gain, and what would run on them when."""
    gains = [
        (
            f"{graph.graph} {graph.phase}",
            str(len(graph.plan.side)),
            _microseconds(graph.plan.one.makespan),
            _microseconds(graph.plan.two.makespan),
            f"{100 * (1 - graph.plan.two.makespan / graph.plan.one.makespan):.1f} %",
            _microseconds(graph.plan.two.host),
            "kept" if graph.plan.gains else "left: no gain",
        )
        for graph in report.graphs
    ]
    columns = ("graph", "on the side", "one stream", "two streams", "gain", "host", "plan")
    title = f"Predicted for {report.device.name}, microseconds"
    tables = [Table(title=title, columns=columns, rows=tuple(gains))]
    return [*tables, *map(_lanes, report.graphs)] if gains else []


def _lanes(graph: "GraphStreams") -> Table:
    """A plan in time: how busy each stream is, column by column."""
    lanes = {"one stream": (graph.plan.one, 0), "main": (graph.plan.two, 0)}
    lanes |= {"side": (graph.plan.two, 1), "link": (graph.plan.two, -1)}
    end = max(graph.plan.one.makespan, graph.plan.two.makespan)
    rows = tuple(
        (name, f"{100 * timeline.busy(stream) / end:.0f} %", _drawn(timeline, stream, end))
        for name, (timeline, stream) in lanes.items()
        if timeline.busy(stream) or name == "side"
    )
    title = f"Graph {graph.graph} {graph.phase}, {end * 1e6:,.0f} microseconds from left to right"
    return Table(title=title, columns=("stream", "busy", "timeline"), rows=rows)


_COLUMNS, _SHADES = 72, " .:-=#"


def _drawn(timeline: "Timeline", stream: int, end: float) -> str:
    """One character for each part of the time: the darker, the longer the stream ran in it."""
    width = end / _COLUMNS
    shares = [0.0] * _COLUMNS
    for span in timeline.spans:
        if span.stream == stream:
            for column in range(int(span.start / width), min(_COLUMNS, int(span.end / width) + 1)):
                first, last = column * width, (column + 1) * width
                shares[column] += max(0.0, min(span.end, last) - max(span.start, first)) / width
    darkest = len(_SHADES) - 1
    return "".join(_SHADES[min(darkest, math.ceil(share * darkest))] for share in shares)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def verify_tables(report: "VerifyReport") -> list[Table]:
    """The checks of `mhc_compile.verify.verify`, and each site's errors."""
    checks = [
        (
            check.name,
            f"{check.value:.1e}",
            f"{check.bound:.0e}",
            check.detail,
            "passed" if check.passed else "FAILED",
        )
        for check in report.checks
    ]
    sites = [
        (
            site.name,
            f"{site.mixing.row_error:.1e}",
            f"{site.mixing.column_error:.1e}",
            f"{site.mixing.smallest:.3f}",
        )
        for site in report.sites
    ]
    return [
        Table(
            title="Properties",
            columns=("property", "error", "bound", "worst at", "result"),
            rows=tuple(checks),
        ),
        Table(
            title="H_res after its parameters have moved",
            columns=("site", "row sums - 1", "column sums - 1", "smallest entry"),
            rows=tuple(sites),
        ),
    ]
