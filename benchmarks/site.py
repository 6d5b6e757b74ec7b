"""One residual site, forward and backward, in every implementation there is on the CPU.

    python -m benchmarks.site [--widths 512 768 1024] [--tokens 2048] [--repeat 20] [--json FILE]

All of them run by turns in one process on one thread: the ops with generated C++, the ops in plain
torch, the reference equations through torch.compile with Inductor, and a floor that no mathematics
enters: 25 rows (a row is one stream: tokens x width) copied, and the three matrix products of the
projection. A site reads the state into u, writes a given branch output f into it, and has the
gradients of u and of the next state; autograd and dispatch are included. Times are CPU time of the
thread, which other load on the machine disturbs less than the clock on the wall.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mhc_compile.kernels.reference import post_ref, pre_ref
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
_ROWS = 25  # what a fused site moves: 10 forward, 15 backward (n = 4)
_RUNS = ("cpp", "reference", "inductor", "floor")


@dataclass(frozen=True, slots=True)
class Row:
    """Times of one implementation at one width, in milliseconds."""

    width: int
    implementation: str
    minimum: float
    median: float
    to_floor: float
    """Minimum over that of the floor."""


class _Site:
    """Random tensors of one site, and its implementations by name."""

    def __init__(self, tokens: int, width: int, streams: int) -> None:
        self.spec = SiteSpec(streams=streams)
        m = 2 * streams + streams * streams
        self.state = torch.randn(1, tokens, streams, width, requires_grad=True)
        self.f = torch.randn(1, tokens, width, requires_grad=True)
        self.phi = (0.02 * torch.randn(streams * width, m)).requires_grad_()
        self.bias = torch.randn(m, requires_grad=True)
        self.alpha = torch.ones(3, requires_grad=True)
        self.grads = [torch.randn_like(self.f), torch.randn_like(self.state)]

    def runs(self, names: Sequence[str]) -> dict[str, Callable[[], object]]:
        compiled = torch.compile(self._equations, fullgraph=True)
        every: dict[str, Callable[[], object]] = {
            "cpp": lambda: self._gradients(self._ops("cpp")),
            "reference": lambda: self._gradients(self._ops("reference")),
            "inductor": lambda: self._gradients(compiled(*self._leaves())),
            "floor": self._floor(),
        }
        return {name: every[name] for name in names}

    def _leaves(self) -> list[torch.Tensor]:
        return [self.state, self.f, self.phi, self.bias, self.alpha]

    def _gradients(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> object:
        return torch.autograd.grad(outputs, self._leaves(), self.grads)

    def _ops(self, kernels: str) -> tuple[torch.Tensor, torch.Tensor]:
        text = f"{self.spec.encode()} kernels={kernels}"
        u, h_post, h_res, _ = OPS.pre(self.state, self.phi, self.bias, self.alpha, text)
        return u, OPS.post(self.state, self.f, h_post, h_res, text)

    def _equations(
        self,
        state: torch.Tensor,
        f: torch.Tensor,
        phi: torch.Tensor,
        bias: torch.Tensor,
        alpha: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u, h_post, h_res = pre_ref(state, phi, bias, alpha, self.spec)
        return u, post_ref(state, f, h_post, h_res, self.spec)

    def _floor(self) -> Callable[[], object]:
        flat, phi = self.state.detach().flatten(0, 1).flatten(1), self.phi.detach()
        z, back, grad = flat @ phi, torch.empty_like(flat), torch.empty_like(phi)
        tokens, width = self.f.shape[1:]
        rows = torch.randn(_ROWS * tokens, width)
        copied = torch.empty_like(rows)

        def run() -> None:
            copied.copy_(rows)
            torch.mm(flat, phi, out=z)
            torch.mm(z, phi.mT, out=back)
            torch.mm(flat.mT, z, out=grad)

        return run


def measure(width: int, tokens: int, streams: int, repeat: int, names: Sequence[str]) -> list[Row]:
    """Times of each implementation over ``repeat`` rounds, after one round that is not counted."""
    runs = _Site(tokens, width, streams).runs(names)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            times[name].append((time.thread_time() - start) * 1e3)
    best = {name: min(values[1:]) for name, values in times.items()}
    floor = best.get("floor", float("nan"))
    return [
        Row(width, name, best[name], statistics.median(values[1:]), best[name] / floor)
        for name, values in times.items()
    ]


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks of every size, as it does of those below 32 MB.

    Otherwise the larger widths would measure page faults, in every implementation alike.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold, size = -3, -1, 1 << 30
        libc.mallopt(m_mmap_threshold, size)
        libc.mallopt(m_trim_threshold, size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=_RUNS, default=_RUNS, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    _keep_freed_memory()
    rows = [
        row
        for width in options.widths
        for row in measure(width, options.tokens, options.streams, options.repeat, options.only)
    ]
    title = f"one site, forward + backward, {options.tokens} tokens, {options.streams} streams"
    table = Table("width", "implementation", "min ms", "median ms", "to floor", title=title)
    for row in rows:
        times = (f"{value:.2f}" for value in (row.minimum, row.median, row.to_floor))
        table.add_row(str(row.width), row.implementation, *times)
    Console().print(table)
    if options.json is not None:
        machine = {
            "machine": platform.machine(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "threads": 1,
            "tokens": options.tokens,
            "streams": options.streams,
        }
        result = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
