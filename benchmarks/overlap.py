"""What it gains to run work while collectives are pending, on an emulated slow link.

    python -m benchmarks.overlap [--links 10 20 50] [--sites 4] [--width 256] [--tokens 512]
        [--repeat 20] [--json FILE]

Two processes of one thread each train a stack of tensor parallel MLP sites, widened to 4 streams.
Every all-reduce takes as many milliseconds as the link is told to, and no processor time. Three
compilations of the same model run by turns: the order of the program, the pass that reorders, and
with sites split as well. All give the same bits. A ratio is that of two steps that followed each
other. The prediction is that of `mhc_compile.passes.simulate`, with the estimate of every node's
time scaled to the time that the program's order took.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

import mhc_compile
from benchmarks.gpt import MLP
from benchmarks.slow_link import SlowLink, join
from benchmarks.timing import keep_freed_memory, machine
from mhc_compile import backend
from mhc_compile.passes.collectives import is_collective
from mhc_compile.passes.estimate import CPU, Device, node_seconds, transfer_seconds
from mhc_compile.passes.simulate import Costs, simulate
from mhc_compile.passes.stream_graph import launches, steps_of

RANKS, STREAMS = 2, 4
_BASE = "program order"
RUNS: Mapping[str, Mapping[str, Any]] = {
    _BASE: {"overlap": "off"},
    "reordered": {"skip_passes": ("split_sites_pass",)},
    "split and reordered": {},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One run on one link; times of rank 0 in milliseconds."""

    link: float
    """What an all-reduce takes."""
    run: str
    forward: float
    backward: float
    """Medians."""
    ratio: float
    """Median of the time of a step over that of the program's order next to it."""
    quartiles: list[float]
    best: float
    """The same ratio of the shortest steps, which other load on the machine lengthens least."""
    predicted: float
    """The same ratio in a simulation."""


class Stack(nn.Module):
    """MLP sites one behind the other."""

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(MLP(width) for _ in range(sites))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        for branch in self.branches:
            x = x + branch(x)
        return x


class _Run:
    """One compilation of the model on this rank."""

    def __init__(self, options: Mapping[str, Any], sites: int, x: Tensor) -> None:
        torch.manual_seed(0)
        self.model, self.x = Stack(sites, x.shape[-1]), x
        mhc_compile.convert_(self.model, x, config=mhc_compile.MHCConfig(streams=STREAMS))
        mesh = init_device_mesh("cpu", (RANKS,))
        for branch in self.model.branches:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(branch, mesh, plan, src_data_rank=None)  # all ranks have the same
        options = {"inner": "aot_eager", **options}
        self.call = torch.compile(self.model, backend="mhc", options=options)
        with _graphs() as self.graphs:
            self.output = self.call(x)
            self.output.square().mean().backward()

    def step(self) -> tuple[float, float]:
        """Milliseconds of a forward and a backward."""
        self.model.zero_grad()
        start = time.perf_counter()
        loss = self.call(self.x).square().mean()
        middle = time.perf_counter()
        loss.backward()
        return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3

    def predicted(self, device: Device) -> float:
        """Seconds of a step in a simulation."""
        return sum(_makespan(gm, device) for gm in self.graphs)


@contextmanager
def _graphs() -> Iterator[list[GraphModule]]:
    """The graphs of AOTAutograd behind all passes, of what is compiled meanwhile."""
    found: list[GraphModule] = []
    passes = backend.lowered_passes

    def look(gm: GraphModule, example_inputs: Sequence[Any]) -> PassResult:
        found.append(gm)
        return PassResult(gm, False)

    def with_look(*args: Any, **kwargs: Any) -> list[Any]:
        return [*passes(*args, **kwargs), ("look", look)]

    with mock.patch.object(backend, "lowered_passes", with_look):
        yield found


def _makespan(gm: GraphModule, device: Device) -> float:
    """Seconds of a graph on one stream beside one link, which is what the emulation has."""
    kernels = [node for node in gm.graph.nodes if launches(node)]
    costs = Costs(
        kernels={node.name: node_seconds(node, device) for node in kernels},
        transfers={n.name: transfer_seconds(n, device) for n in kernels if is_collective(n)},
        launch=0.0,  # on a CPU it is part of what an operation takes
        sync=0.0,
    )
    return simulate(tuple(steps_of(gm.graph.nodes, {})), costs).makespan


def _rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Everything that one process does; rank 0 writes rows."""
    torch.set_num_threads(1)
    keep_freed_memory()
    link = join(f"{folder}/store", rank, RANKS)
    x = torch.randn(1, options.tokens, options.width, generator=torch.Generator().manual_seed(1))
    runs = {name: _Run(settings, options.sites, x) for name, settings in RUNS.items()}
    outputs = [run.output for run in runs.values()]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    rows = []
    for milliseconds in options.links:
        link.seconds = milliseconds / 1e3
        times = _by_turns(link, runs, options.repeat)
        device = _calibrated(link.seconds, runs[_BASE], times[_BASE])
        base = runs[_BASE].predicted(device)
        rows += [
            _row(milliseconds, name, times, run.predicted(device) / base)
            for name, run in runs.items()
        ]
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps([asdict(row) for row in rows]))
    link.gloo.barrier().wait()


def _calibrated(link: float, run: _Run, times: Sequence[tuple[float, float]]) -> Device:
    """The device of the estimate, as fast as it was in this run: other load slows it.

    Args:
        link: seconds of an all-reduce.
        run: the program's order, where nothing runs beside a transfer.
        times: milliseconds of its steps.
    """
    idle = replace(CPU, link_latency=0.0, link_bandwidth=float("inf"))
    device = replace(idle, link_latency=link)
    compute, step = run.predicted(idle), run.predicted(device)
    slower = (statistics.median(map(sum, times)) / 1e3 - (step - compute)) / compute
    return replace(
        device,
        single_flops=device.single_flops / slower,
        half_flops=device.half_flops / slower,
        bandwidth=device.bandwidth / slower,
        launch=device.launch * slower,
        op_launch=device.op_launch * slower,
    )


def _by_turns(
    link: SlowLink, runs: Mapping[str, _Run], repeat: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of ``repeat`` steps of each run, one after the other, from another one each time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = [*runs, *runs]
    for number in range(repeat + 1):
        first = number % len(runs)
        for name in islice(names, first, first + len(runs)):
            link.gloo.barrier().wait()
            taken = runs[name].step()
            if number:  # one round before them is not counted
                times[name].append(taken)
    return times


def _row(
    link: float, name: str, times: Mapping[str, Sequence[tuple[float, float]]], predicted: float
) -> Row:
    pairs = zip(times[name], times[_BASE], strict=True)
    ratios = [sum(own) / sum(base) for own, base in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    forward, backward = (statistics.median(part) for part in zip(*times[name], strict=True))
    best = min(map(sum, times[name])) / min(map(sum, times[_BASE]))
    return Row(link, name, forward, backward, middle, [low, high], best, predicted)


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of all runs on all links."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, args=(folder, options), nprocs=RANKS)
        return [Row(**row) for row in json.loads(Path(folder, "rows").read_text())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", type=float, nargs="+", default=[10, 20, 50], metavar="MS")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = measure(options)
    title = (
        f"training step, {options.sites} sites, C={options.width}, {options.tokens} tokens, "
        f"n={STREAMS}, {RANKS} ranks"
    )
    columns = (
        "link ms",
        "run",
        "forward ms",
        "backward ms",
        "ratio",
        "quartiles",
        "best",
        "predicted",
    )
    table = Table(*columns, title=title)
    for row in rows:
        low, high = row.quartiles
        table.add_row(
            f"{row.link:g}",
            row.run,
            f"{row.forward:.1f}",
            f"{row.backward:.1f}",
            f"{row.ratio:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row.best:.3f}",
            f"{row.predicted:.3f}",
        )
    Console().print(table)
    if options.json is not None:
        setting = {name: vars(options)[name] for name in ("sites", "width", "tokens", "repeat")}
        result = {
            "machine": machine(),
            "setting": setting,
            "load": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
