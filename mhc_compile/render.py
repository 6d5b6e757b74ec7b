"""The terminal: rich tables and progress there, plain text everywhere else."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from mhc_compile.tables import Table, to_text

_NUMBER = re.compile(r"-?[\d,.]*(e[-+]\d+)?")
_STYLES = {"passed": "green", "FAILED": "bold red", "left": "yellow"}


def show(summary: str, tables: Iterable[Table], notes: Iterable[str] = ()) -> None:
    """Print a summary line, tables and notes on standard output."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        parts = [summary, *map(to_text, tables), *(f"note: {note}" for note in notes)]
        print("\n\n".join(parts))
        return
    console.print(Text(summary, style="bold"))
    for table in tables:
        console.print(_rich_table(table))
    for note in notes:
        console.print(Text.assemble(("note: ", "yellow"), note))


def show_error(message: str) -> None:
    """Print an error as one red line on standard error."""
    line = " ".join(message.split())
    Console(file=sys.stderr, soft_wrap=True).print(Text(f"error: {line}", style="red"))


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Show what long work does, on standard error and only on a terminal.

    Yields:
        A function that is told what begins now.
    """
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(pulse_style="cyan"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda step: bar.update(task, description=f"{title}: {step}")


def _rich_table(table: Table) -> RichTable:
    drawn = RichTable(title=table.title, title_justify="left", header_style="bold")
    for column, cells in zip(table.columns, zip(*table.rows, strict=True), strict=True):
        numbers = all(_NUMBER.fullmatch(cell) for cell in cells)
        drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in table.rows:
        style = _STYLES.get(row[-1].partition(":")[0], "")
        drawn.add_row(*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style))
    return drawn
