"""What hyper-connections add to a training step of compiled transformer blocks.

    python -m benchmarks.overhead [--widths 256 512 768 1024] [--streams 2 4] [--json FILE]

By turns in one process on one thread, forward and backward of a stack of blocks: the plain model
through Inductor; the same converted, through the "mhc" backend, without and with recomputation; and
hyper-connections written by hand, through Inductor. Everything is included: autograd, dispatch, and
the ends of the trunk. ``--whole`` takes a GPT with embedding and head instead.

The overhead depends on how fast the plain model's matrix products are: the table gives their rate.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mhc_compile
from benchmarks.gpt import GPT, VOCABULARY, Blocks, ByHand
from benchmarks.timing import by_turns, keep_freed_memory, machine

_MHC = {"mhc": "off", "mhc, recompute": "auto"}
"""Name of a run -> its setting of recompute."""


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of CPU time of a training step."""

    width: int
    streams: int
    run: str
    minimum: float
    median: float
    overhead: float
    """Minimum over the plain model's, minus 1."""


def _step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        call(x).square().mean().backward()
        model.zero_grad()
        x.grad = None

    return run


def _runs(
    width: int, streams: int, layers: int, tokens: int, whole: bool, by_hand: bool
) -> dict[str, Callable[[], object]]:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return GPT(layers, width) if whole else Blocks(layers, width)

    x = torch.randn(1, tokens, width, requires_grad=True)
    if whole:
        x = torch.randint(VOCABULARY, (1, tokens))
    torch._dynamo.reset()
    plain = model()
    runs = {"plain": _step(torch.compile(plain), plain, x)}
    for name, recompute in _MHC.items():
        converted = model()
        mhc_compile.convert_(converted, x, config=mhc_compile.MHCConfig(streams=streams))
        compiled = torch.compile(converted, backend="mhc", options={"recompute": recompute})
        runs[name] = _step(compiled, converted, x)
    if by_hand and not whole:
        written = ByHand(layers, width, streams)
        runs["by hand"] = _step(torch.compile(written), written, x)
    return runs


def _rate(width: int, tokens: int) -> float:
    """Gflop/s of a matrix product of the plain model's."""
    a, b = torch.randn(tokens, width), torch.randn(width, 4 * width)
    best = min(by_turns({"mm": lambda: a @ b}, 10)["mm"])
    return 8 * tokens * width**2 / best / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--whole", action="store_true", help="a GPT with embedding and head")
    parser.add_argument("--no-by-hand", action="store_true", help="its compilation takes minutes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows, rates = [], {}
    console = Console()
    with console.status("starting") as status:
        for width in options.widths:
            rates[width] = _rate(width, options.tokens)
            for streams in options.streams:
                status.update(f"C={width}, n={streams}")
                runs = _runs(
                    width, streams, options.layers, options.tokens, options.whole,
                    not options.no_by_hand,
                )  # fmt: skip
                times = by_turns(runs, options.repeat)
                base = min(times["plain"])
                rows += [
                    Row(width, streams, name, min(t), statistics.median(t), min(t) / base - 1)
                    for name, t in times.items()
                ]
    what = "GPT" if options.whole else "stack"
    title = f"training step, {what} of {options.layers} blocks, {options.tokens} tokens, 1 thread"
    table = Table("width", "Gflop/s", "streams", "run", "min ms", "median", "overhead", title=title)
    for row in rows:
        table.add_row(
            str(row.width),
            f"{rates[row.width]:.0f}",
            str(row.streams),
            row.run,
            f"{row.minimum:.1f}",
            f"{row.median:.1f}",
            f"{row.overhead:+.1%}",
        )
    console.print(table)
    if options.json is not None:
        setting = {"layers": options.layers, "tokens": options.tokens, "whole": options.whole}
        result = {
            "machine": machine(),
            "setting": setting,
            "gflops": rates,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
