"""What a GPT keeps for its backward, plain and converted, and what replaying costs.

    python -m benchmarks.memory [--layers 12 28] [--width 256] [--tokens 1024] [--json FILE]

For every depth: the bytes that saved-tensor hooks see per token, each storage once and parameters
left out; the peak resident memory of a training step beyond what was there before it; and the
median CPU time of a step, all variants by turns in one process. Variants: the plain model, the
plain model with torch checkpoints around its blocks, and the converted model with recompute "off"
and "auto". Each peak is taken in a process of its own. One thread, Inductor.
"""

import argparse
import json
import multiprocessing
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mhc_compile
from benchmarks.gpt import GPT, VOCABULARY
from benchmarks.timing import by_turns, machine, return_freed_memory
from mhc_compile.memory import memory_plan

STREAMS = 4
VARIANTS = ("plain", "checkpoint", "off", "auto")


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of one model."""

    sites: int
    variant: str
    saved: float
    """Bytes per token that are saved for the backward."""
    planned: float
    """Bytes per token that the memory plan adds to the plain model's; 0 for plain variants."""
    peak: float
    """MiB of resident memory that a step needs beyond the model."""
    step: float
    """Median seconds of CPU time of a step."""


class _Variant:
    """A compiled model and its training step."""

    def __init__(self, name: str, layers: int, width: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (1, tokens))
        self.model = GPT(layers, width, checkpointed=name == "checkpoint")
        self.planned = 0
        if name in ("off", "auto"):
            config = mhc_compile.MHCConfig(streams=STREAMS, recompute=name)  # type: ignore[arg-type]
            report = mhc_compile.convert_(self.model, self.tokens, config=config)
            self.planned = sum(trunk.kept for trunk in memory_plan(report).trunks)
            options = {"recompute": name}
            self.call = torch.compile(self.model, backend="mhc", options=options)
        else:
            self.call = torch.compile(self.model)

    def step(self) -> None:
        self.call(self.tokens).square().mean().backward()
        self.model.zero_grad()

    def saved(self) -> int:
        """Bytes saved by one forward."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.call(self.tokens)
        del output
        return sum(sizes.values())


def _resident() -> float:
    """MiB of resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def peak(name: str, layers: int, width: int, tokens: int) -> float:
    """MiB that a step needs beyond the compiled model and its gradients; in this process."""
    torch.set_num_threads(1)
    return_freed_memory()
    variant = _Variant(name, layers, width, min(tokens, 128))
    variant.step()  # compiles, for any length
    variant.tokens = torch.randint(VOCABULARY, (1, tokens))
    torch._dynamo.mark_dynamic(variant.tokens, 1)
    highest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, _resident())

    before = _resident()
    thread = threading.Thread(target=watch)
    thread.start()
    variant.step()
    done.set()
    thread.join()
    return highest - before


def measure(
    layers: int, width: int, tokens: int, repeat: int, tell: Callable[[str], None]
) -> list[Row]:
    """All variants at one depth."""
    variants = {}
    for name in VARIANTS:
        tell(f"{layers} layers: compiling {name}")
        torch._dynamo.reset()
        variants[name] = _Variant(name, layers, width, tokens)
        variants[name].step()
    tell(f"{layers} layers: stepping")
    times = by_turns({name: variant.step for name, variant in variants.items()}, repeat)
    rows = []
    for name, variant in variants.items():
        tell(f"{layers} layers: peak of {name}")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            highest = pool.apply(peak, (name, layers, width, tokens))
        rows.append(
            Row(
                2 * layers,
                name,
                variant.saved() / tokens,
                variant.planned / tokens,
                highest,
                statistics.median(times[name]) / 1e3,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 28])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    with console.status("starting") as status:
        rows = [
            row
            for layers in options.layers
            for row in measure(layers, options.width, options.tokens, options.repeat, status.update)
        ]
    plain = {row.sites: row for row in rows if row.variant == "plain"}
    title = f"training step, C={options.width}, {options.tokens} tokens, n={STREAMS}"
    columns = ("sites", "variant", "saved B/token", "over plain", "planned", "peak MiB", "step s")
    table = Table(*columns, title=title)
    for row in rows:
        base = plain[row.sites]
        table.add_row(
            str(row.sites),
            row.variant,
            f"{row.saved:.0f}",
            f"{row.saved - base.saved:+.0f}",
            f"{row.planned:.0f}",
            f"{row.peak:.0f} ({row.peak / base.peak:.2f}x)",
            f"{row.step:.3f} ({row.step / base.step:.3f}x)",
        )
    console.print(table)
    if options.json is not None:
        setting = {"streams": STREAMS, "width": options.width, "tokens": options.tokens}
        found = [asdict(row) for row in rows]
        result = {"machine": machine(), "setting": setting, "rows": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
