"""How long a converted model takes to compile, against the plain one, with cold caches.

    python -m benchmarks.compile_time [--layers 4] [--width 256] [--tokens 256] [--json FILE]

The first training step of a GPT, forward and backward, each time in a new process with empty caches
of Inductor and of the generated kernels. Conversion is listed apart. Processes take turns; one
thread and one compile worker.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.timing import in_cold_process

VARIANTS = ("plain", "mhc", "by hand")


def first_step(variant: str, layers: int, width: int, tokens: int) -> tuple[float, float]:
    """Seconds of the conversion (0 if there is none) and of the first step, in this process."""
    import torch

    import mhc_compile
    from benchmarks.gpt import GPT, VOCABULARY, ByHand

    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, tokens))
    model = GPT(layers, width)
    if variant == "by hand":
        model.blocks = ByHand(layers, width, 4)  # type: ignore[assignment]
    start = time.perf_counter()
    if variant == "mhc":
        mhc_compile.convert_(model, ids)
    converted = time.perf_counter()
    compiled = torch.compile(model, backend="mhc" if variant == "mhc" else "inductor")
    compiled(ids).square().mean().backward()
    return converted - start, time.perf_counter() - converted


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in options.only}
    console = Console()
    with console.status("starting") as status:
        for number in range(options.repeat):
            for name, found in times.items():
                status.update(f"{name}, {number + 1} of {options.repeat}")
                call = f"first_step({name!r}, {options.layers}, {options.width}, {options.tokens})"
                conversion, step = in_cold_process("benchmarks.compile_time", call)
                found.append((conversion, step))
    title = f"first training step of a GPT, {options.layers} layers, C={options.width}, cold caches"
    table = Table("run", "conversion s", "min s", "median s", "to plain", title=title)
    medians = {name: statistics.median(s for _, s in found) for name, found in times.items()}
    rows = []
    for name, found in times.items():
        conversion = statistics.median(c for c, _ in found)
        row = {"run": name, "conversion": conversion, "steps": [s for _, s in found]}
        ratio = medians[name] / medians["plain"] if "plain" in medians else None
        rows.append({**row, "median": medians[name], "to_plain": ratio})
        table.add_row(
            name,
            f"{conversion:.1f}" if name == "mhc" else "",
            f"{min(s for _, s in found):.1f}",
            f"{medians[name]:.1f}",
            f"{ratio:.2f}" if ratio else "",
        )
    console.print(table)
    if options.json is not None:
        size = {"layers": options.layers, "width": options.width, "tokens": options.tokens}
        options.json.write_text(json.dumps({"setting": size, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
