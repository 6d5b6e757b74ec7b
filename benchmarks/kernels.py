"""What the generated Triton kernels move and take, without a GPU: `python -m benchmarks.kernels`.

Bytes of streams are counted in Triton's interpreter, in a process of its own, for every form of
every op: compulsory bytes per token, in rows (a row: the channels of one stream). Registers, spills
and shared memory come from compiling ahead of time for each target. Nothing is timed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.stats import KernelStats, site_stats
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.traffic import forms

_COUNT = "--count"  # tells a process that it interprets


@dataclass(frozen=True, slots=True)
class Counted:
    """Rows per token that one form of an op was seen to move."""

    op: str
    kernels: tuple[str, ...]
    rows: float
    least: int
    launches: int


def count(spec: SiteSpec, channels: int, tokens: int) -> Iterator[Counted]:
    """Count every form; only in a process that interprets."""
    from tests.kernels.triton import interpreter

    interpreter.enable()
    from tests.kernels.triton.forms import metered

    dtype = torch.bfloat16
    row = tokens * channels * dtype.itemsize
    least = {form.op: form.least for form in forms(spec)}
    for (op, names), (meter, moved) in metered(spec, tokens, channels, dtype).items():
        meter.check()
        yield Counted(op, names, moved / row, least[op], len(meter.launches))


def _count_elsewhere(arguments: Sequence[str]) -> list[Counted]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *arguments, _COUNT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = (json.loads(line) for line in done.stdout.splitlines())
    return [Counted(**{**row, "kernels": tuple(row["kernels"])}) for row in rows]


def _show(counted: list[Counted], stats: list[KernelStats], title: str) -> None:
    moved = Table("op", "rows", "least", "launches", "kernels on streams", title=title)
    for row in sorted(counted, key=lambda row: row.op):
        numbers = (f"{row.rows:g}", str(row.least), str(row.launches))
        moved.add_row(row.op, *numbers, " + ".join(row.kernels))
    targets = list(dict.fromkeys(row.target for row in stats))
    taken = Table("kernel", *targets, title="registers / spilled bytes / shared KB")
    for kernel in dict.fromkeys(row.kernel for row in stats):
        of = {row.target: row for row in stats if row.kernel == kernel}
        cells = (of[target] for target in targets)
        taken.add_row(
            kernel, *(f"{c.registers} / {c.spills} / {c.shared / 1024:.0f}" for c in cells)
        )
    console = Console()
    console.print(moved)
    console.print(taken)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, compile, print two tables, and write JSON if asked."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--constraint", default="sinkhorn")
    parser.add_argument("--width", type=int, default=1280, help="channels, to compile for")
    parser.add_argument("--counted-width", type=int, default=256, help="channels, to count at")
    parser.add_argument("--tokens", type=int, default=8, help="to count with")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(_COUNT, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    spec = SiteSpec(streams=options.streams, constraint=options.constraint)
    if options.count:
        for row in count(spec, options.counted_width, options.tokens):
            print(json.dumps(asdict(row)), flush=True)
        return
    counted = _count_elsewhere(given)
    stats = [
        row
        for target in options.targets
        for row in site_stats(spec, torch.bfloat16, options.width, target)
    ]
    title = f"{spec.encode()}: rows per token ({options.counted_width} channels of bfloat16)"
    _show(counted, stats, title)
    if options.json is not None:
        result = {
            "site": spec.encode(),
            "width": options.width,
            "counted_width": options.counted_width,
            "tokens": options.tokens,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "bytes": [asdict(row) for row in counted],
            "resources": [asdict(row) for row in stats],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
