"""A seam and the norm of the branch behind it, on the CPU: norm by Inductor, or in the seam.

    python -m benchmarks.seam_norm [--widths 768] [--tokens 1024] [--repeat 40] [--json FILE]

Run by turns in one process on one thread, through torch.compile: the seam alone, with torch's norm
behind it, and with the norm inside (``mhc::seam_norm``); forward without gradients, and forward and
backward. Milliseconds of CPU time; autograd and dispatch are included.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import by_turns, keep_freed_memory, machine
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
_EPS = 1e-5
_NORMS = ("rms", "layer")

Forward = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """Times of one way to run a seam and a norm, in milliseconds."""

    width: int
    norm: str
    direction: str
    implementation: str
    minimum: float
    median: float


def _ways(spec: SiteSpec, norm: str, width: int) -> dict[str, Forward]:
    text = spec.encode()
    normed = replace(spec, branch_norm=norm, branch_eps=_EPS).encode()

    def alone(*leaves: torch.Tensor) -> Sequence[torch.Tensor]:
        return OPS.seam(*leaves[:7], text)[:4]

    def behind(*leaves: torch.Tensor) -> Sequence[torch.Tensor]:
        state, u, *mappings = alone(*leaves)
        if norm == "rms":
            y = torch.nn.functional.rms_norm(u, (width,), leaves[7], _EPS)
        else:
            y = torch.nn.functional.layer_norm(u, (width,), leaves[7], None, _EPS)
        return state, y, *mappings

    def inside(*leaves: torch.Tensor) -> Sequence[torch.Tensor]:
        return OPS.seam_norm(*leaves, None, normed)[:4]

    return {"seam alone": alone, "norm behind": behind, "norm inside": inside}


def measure(width: int, tokens: int, streams: int, repeat: int, norm: str) -> list[Row]:
    """Times of each way, forward and in both directions, over ``repeat`` rounds."""
    n, columns = streams, 2 * streams + streams * streams
    leaves = [
        torch.randn(1, tokens, n, width),
        torch.randn(1, tokens, width),
        torch.rand(1, tokens, n),
        torch.randn(1, tokens, n, n).softmax(-1),
        0.02 * torch.randn(n * width, columns),
        torch.randn(columns),
        torch.ones(3),
        torch.ones(width),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = [torch.randn_like(leaf) for leaf in leaves[:4]]

    def forward(call: Forward) -> Callable[[], object]:
        return torch.no_grad()(lambda: call(*leaves))

    def both(call: Forward) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*leaves), leaves, grads, allow_unused=True)

    runs = {}
    for name, way in _ways(SiteSpec(streams=n, kernels="cpp"), norm, width).items():
        compiled = torch.compile(way, fullgraph=True)
        runs["forward", name] = forward(compiled)
        runs["forward + backward", name] = both(compiled)
    times = by_turns({" / ".join(key): run for key, run in runs.items()}, repeat)
    return [
        Row(width, norm, *key, min(values), statistics.median(values))
        for key, values in zip(runs, times.values(), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[768])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for width in options.widths:
        for norm in _NORMS:
            rows += measure(width, options.tokens, options.streams, options.repeat, norm)
    title = f"a seam and a norm, {options.tokens} tokens, {options.streams} streams"
    columns = ("width", "norm", "direction", "implementation", "min ms", "median ms")
    table = Table(*columns, title=title)
    for row in rows:
        times = f"{row.minimum:.2f}", f"{row.median:.2f}"
        table.add_row(str(row.width), row.norm, row.direction, row.implementation, *times)
    Console().print(table)
    if options.json is not None:
        result = {
            "machine": machine(),
            "tokens": options.tokens,
            "streams": options.streams,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
