"""Run every benchmark and write docs/performance.md from what they found.

    python -m benchmarks.performance [--keep DIR] [--only NAME ...]

Results are kept as JSON files in DIR; one that is there already is not run again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.timing import machine

_PAGE = Path("docs/performance.md")


@dataclass(frozen=True, slots=True)
class _Part:
    """One benchmark on the page."""

    name: str
    title: str
    arguments: tuple[str, ...]
    text: str


_PARTS = (
    _Part(
        "site",
        "One residual site",
        ("--repeat", "30"),
        "Forward and backward of one site, CPU milliseconds of one thread. The floor copies the "
        "rows that a fused site must move and multiplies the three products of its projection, "
        "with torch; `to_floor` is the ratio of the minima.",
    ),
    _Part(
        "seam_norm",
        "The norm of a branch",
        ("--repeat", "60"),
        "A seam alone, with the norm of the next branch behind it by Inductor, and with that norm "
        "inside (`seam_norm=True`); CPU milliseconds of one thread.",
    ),
    _Part(
        "overhead",
        "What a training step costs more",
        ("--widths", "768", "--streams", "4", "--repeat", "16", "--no-by-hand"),
        "A stack of two compiled transformer blocks, forward and backward, CPU milliseconds of one "
        "thread. The plain model goes through Inductor; `mhc` is the same model converted, without "
        "and with recomputation. `overhead` is by the minima, over the plain model. It depends on "
        "how fast the plain products are (Gflop/s below). Without `--no-by-hand` the paper's "
        "equations written in torch, through Inductor, stand beside it; to compile those takes "
        "minutes.",
    ),
    _Part(
        "compile_time",
        "Compile time",
        ("--only", "plain", "mhc", "--repeat", "1"),
        "The first training step of a GPT in a new process with cold caches, seconds.",
    ),
    _Part(
        "memory",
        "Memory",
        ("--layers", "12", "--tokens", "4096", "--repeat", "2"),
        "What a GPT keeps for its backward: bytes per token seen by saved-tensor hooks, what the "
        "memory plan predicts on top of the plain model, the peak of resident memory of a step "
        "(MiB), and seconds of a step. `checkpoint` is the plain model with torch checkpoints "
        "around its blocks; `off` and `auto` are settings of `recompute`.",
    ),
    _Part(
        "passes",
        "Graph passes",
        (),
        "Seconds of each pass on decoders of growing depth.",
    ),
    _Part(
        "overlap",
        "Work behind a collective",
        ("--repeat", "40"),
        "A training step of tensor parallel sites on two ranks of one thread each; the link takes "
        "`link` milliseconds for every all-reduce and no processor time. Wall milliseconds of one "
        "rank. `ratio` is the median over pairs of steps that followed each other, with its "
        "quartiles; `best` is that of the shortest steps, `predicted` that of a simulation: every "
        "node's time from the estimate, scaled to the time of the program's order.",
    ),
    _Part(
        "chains",
        "Hyper-connections written by hand",
        ("--only", "site", "model"),
        'Models that are hyper-connected already, through Inductor and through `backend="mhc"`: '
        "CPU milliseconds of a step of one thread. `compile_s` is the first step in a new process, "
        "kernels built and caches empty. `the rest alone` is the model with plain residual adds.",
    ),
    _Part(
        "kernels",
        "Generated Triton kernels",
        (),
        "Counted, not timed: rows of one stream per token by Triton's interpreter, and what its "
        "compilers take for each target: registers / spilled bytes / KB of shared memory.",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, default=Path(".cache/benchmarks"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in _PARTS])
    options = parser.parse_args(arguments)
    options.keep.mkdir(parents=True, exist_ok=True)
    console = Console()
    found = {}
    for part in _PARTS:
        if options.only and part.name not in options.only:
            continue
        result = options.keep / f"{part.name}.json"
        if not result.exists():
            console.rule(part.name)
            command = [sys.executable, "-m", f"benchmarks.{part.name}", *part.arguments]
            subprocess.run([*command, "--json", str(result)], check=True)
        found[part] = json.loads(result.read_text())
    _PAGE.parent.mkdir(exist_ok=True)
    _PAGE.write_text(_page(found))
    console.print(f"wrote {_PAGE}")


def _page(found: Mapping[_Part, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads")
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks.performance`; every table is one run of the command "
        "above it.",
        "",
        f"Machine: {described}. Date: {date.today().isoformat()}. No GPU was used.",
    ]
    for part, result in found.items():
        command = " ".join(("python -m", f"benchmarks.{part.name}", *part.arguments))
        lines += ["", f"## {part.title}", "", f"`{command}`", "", part.text]
        for rows in _tables(result):
            lines += ["", *_table(rows)]
        if isinstance(result, dict) and "gflops" in result:
            rates = ", ".join(f"C={w}: {rate:.0f}" for w, rate in result["gflops"].items())
            lines += ["", f"Gflop/s of a plain product: {rates}."]
        if isinstance(result, dict) and "load" in result:
            load = f"{result['load']:.1f} on {result['cores']} cores"
            lines += ["", f"Load average of the machine in the last minute of it: {load}."]
    return "\n".join(lines) + "\n"


def _tables(result: Any) -> list[Sequence[Mapping[str, Any]]]:
    if isinstance(result, list):
        return [result]
    if "resources" not in result:
        return [result["rows"]]
    taken: dict[str, dict[str, Any]] = {}  # a row for each kernel, a column for each target
    for row in result["resources"]:
        cell = f"{row['registers']} / {row['spills']} / {row['shared'] / 1024:.0f}"
        taken.setdefault(row["kernel"], {"kernel": row["kernel"]})[row["target"]] = cell
    return [result["bytes"], list(taken.values())]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(rows[0])
    lines = [_line(columns), _line(["---"] * len(columns))]
    return [*lines, *(_line([_cell(row[column]) for column in columns]) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
