"""``index.html``: a whole dump on one page, without scripts, fonts or anything from a network."""

import difflib
from collections.abc import Iterator, Sequence
from html import escape

from mhc_compile.memory import memory_plan
from mhc_compile.pictures.svg import to_svg
from mhc_compile.recorder import GraphRecord, Recorder
from mhc_compile.report import Report
from mhc_compile.stages import Stage
from mhc_compile.tables import (
    Table,
    byte_table,
    memory_tables,
    report_tables,
    stage_table,
    summary_line,
)

_DIFF_LINES = 1500
_SMALLEST = 0.75
"""Pictures are not scaled down further than this."""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #0f172a; margin: 0 auto;
  max-width: 1500px; padding: 16px; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
a { color: #1d4ed8; } :focus-visible { outline: 3px solid #2563eb; outline-offset: 2px; }
.pictures { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; }
figure { margin: 0; flex: 1 1 420px; min-width: 0; }
.scroll { overflow-x: auto; border: 1px solid #cbd5e1; border-radius: 8px; }
.scroll svg { display: block; max-width: 100%; height: auto; }
figcaption { font-weight: 600; margin-bottom: 6px; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
caption { text-align: left; font-weight: 600; padding: 8px; }
th, td { text-align: left; padding: 4px 8px; border-top: 1px solid #e2e8f0; vertical-align: top; }
th { background: #f1f5f9; } .number { text-align: right; font-variant-numeric: tabular-nums; }
pre { font: 12px/1.45 "DejaVu Sans Mono", monospace; margin: 0; padding: 8px; }
pre ins { background: #dcfce7; text-decoration: none; } pre del { background: #fee2e2;
  text-decoration: none; } pre b { color: #7c3aed; font-weight: 400; }
summary { cursor: pointer; padding: 6px 0; } .note { color: #475569; }
"""


def page(recorder: Recorder, report: Report) -> str:
    """The page of a dump.

    Args:
        recorder: the graphs.
        report: what was found and rewritten.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.model)}: graphs before and after</title>",
        f"<style>{_STYLE}</style></head><body><main>",
        f"<h1>{escape(report.model)}</h1>",
        f"<p>{escape(summary_line(report))}.</p>",
        *(f'<p class="note">Note: {escape(note)}</p>' for note in report.notes),
    ]
    excerpts = {name: text for graph in recorder.graphs for name, text in graph.excerpts.items()}
    for graph in recorder.graphs:
        parts += _graph(graph, alone=len(recorder.graphs) == 1)
    parts.append("<h2>Residual sites and other adds</h2>")
    parts += [_table(table, frozenset(excerpts)) for table in report_tables(report, every_add=True)]
    if report.trunks:
        parts.append("<h2>Memory</h2>")
        parts += [_table(table, frozenset()) for table in memory_tables(memory_plan(report))]
    for graph in recorder.graphs:
        parts += _changes(graph)
    parts.append("<h2>Source</h2>")
    parts += [
        f'<section id="{_anchor(name)}"><h3>{escape(name)}</h3>'
        f"{_code(escape(text), name)}</section>"
        for name, text in sorted(excerpts.items())
    ]
    return "\n".join([*parts, "</main></body></html>"]) + "\n"


def _graph(graph: GraphRecord, *, alone: bool) -> Iterator[str]:
    title = "Before and after" if alone else f"Graph {graph.number}: before and after"
    yield f'<h2>{title}</h2><div class="pictures">'
    for stage in graph.stages:
        if stage.view is not None:
            label = f"graph {graph.number} {stage.name} the rewrite"
            svg = _no_smaller(to_svg(stage.view, label))
            yield (
                f"<figure><figcaption>{stage.name.capitalize()}</figcaption>"
                f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{svg}</div>'
            )
            yield from (f'<p class="note">{escape(note)}</p>' for note in stage.view.notes)
            yield "</figure>"
    yield "</div>"


def _changes(graph: GraphRecord) -> Iterator[str]:
    """What each pass changed, the bytes of the mhc ops, and the diff."""
    yield f"<h2>Graph {graph.number} in numbers</h2>"
    forward = [stage for stage in graph.stages if stage.phase == "fw"]
    yield _table(stage_table(forward), frozenset())
    if graph.traffic:
        yield _table(byte_table(graph.traffic), frozenset())
    kernels = "".join(
        f'<li><a href="graph_{graph.number}/kernels/{escape(name)}">{escape(name)}</a></li>'
        for name in sorted(graph.kernels)
    )
    if kernels:
        yield f"<p>Generated kernels:</p><ul>{kernels}</ul>"
    yield from _diff(forward[0], forward[-1])


def _diff(before: Stage, after: Stage) -> Iterator[str]:
    lines = list(
        difflib.unified_diff(before.text.splitlines(), after.text.splitlines(), n=1, lineterm="")
    )[2:]
    shown = "\n".join(map(_diff_line, lines[:_DIFF_LINES]))
    more = len(lines) - _DIFF_LINES
    yield f"<details><summary>Diff of the graph: {len(lines)} lines</summary>"
    yield _code(shown, "difference between the graph before and after")
    if more > 0:
        yield f'<p class="note">{more} more lines are in before_after.diff.</p>'
    yield "</details>"


def _diff_line(line: str) -> str:
    tag = {"+": "ins", "-": "del", "@": "b"}.get(line[:1])
    text = escape(line if len(line) <= 400 else f"{line[:400]} …")
    return f"<{tag}>{text}</{tag}>" if tag else text


def _code(markup: str, label: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<pre>{markup}</pre></div>"
    )


def _table(table: Table, linked: frozenset[str]) -> str:
    """A table; cells that name a line of ``linked`` lead there."""
    columns = zip(table.columns, zip(*table.rows, strict=True), strict=True)
    head = "".join(
        f'<th scope="col"{_kind(all(map(_is_number, cells)))}>{escape(column)}</th>'
        for column, cells in columns
    )
    rows = "".join(f"<tr>{_cells(row, linked)}</tr>" for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><caption>{escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cells(row: Sequence[str], linked: frozenset[str]) -> str:
    cells = []
    for cell in row:
        text = escape(cell)
        if cell in linked:
            text = f'<a href="#{_anchor(cell)}">{text}</a>'
        cells.append(f"<td{_kind(_is_number(cell))}>{text}</td>")
    return "".join(cells)


def _anchor(name: str) -> str:
    return "source-" + "".join(c if c.isalnum() else "-" for c in name)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").isdecimal()


def _kind(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _no_smaller(svg: str) -> str:
    """The picture with a bound on how far a narrow window shrinks it; from there on it scrolls."""
    width = float(svg.split('" width="', 1)[1].split('"', 1)[0])
    return svg.replace("<svg ", f'<svg style="min-width:{width * _SMALLEST:.0f}px" ', 1)
