"""One seam, forward and backward, in every implementation there is on the CPU.

    python -m benchmarks.site [--widths 512 768 1024] [--tokens 2048] [--repeat 20] [--json FILE]

A seam is what lies between two branches: the next state from the present one and a branch output,
and from it the input and the mappings of the next branch. Run by turns in one process on one
thread: the seam in generated C++, its two halves in generated C++, both ops in plain torch, the
equations through torch.compile with Inductor, DeepSeek-V4's module in transformers with and without
Inductor where it is installed, and a floor that no mathematics enters: 25 rows (a row is one
stream: tokens x width) copied, and the three matrix products of the projection. Autograd and
dispatch are included.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import by_turns, keep_freed_memory, machine
from mhc_compile.kernels.reference import seam_ref
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
_ROWS = 25  # what a fused seam moves: 10 forward, 15 backward (n = 4)
_RUNS = (
    "seam",
    "halves",
    "plain torch",
    "inductor",
    "transformers",
    "transformers, inductor",
    "floor",
)

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """Times of one implementation at one width, in milliseconds."""

    width: int
    implementation: str
    minimum: float
    median: float
    to_floor: float
    """Minimum over that of the floor."""
    to_inductor: float
    """Minimum over that of Inductor on the same equations."""


class _Seam:
    """Random tensors of one seam, and its implementations by name."""

    def __init__(self, tokens: int, width: int, streams: int) -> None:
        self.spec = SiteSpec(streams=streams)
        n, m = streams, 2 * streams + streams * streams
        self.leaves = [
            torch.randn(1, tokens, n, width),
            torch.randn(1, tokens, width),
            torch.rand(1, tokens, n),
            torch.randn(1, tokens, n, n).softmax(-1),
            0.02 * torch.randn(n * width, m),
            torch.randn(m),
            torch.ones(3),
        ]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.grads = [torch.randn_like(leaf) for leaf in self.leaves[:4]]

    def runs(self, names: Sequence[str]) -> dict[str, Run]:
        every = {
            "seam": lambda: self._run(lambda *leaves: OPS.seam(*leaves, self._text("cpp"))[:4]),
            "halves": lambda: self._run(self._halves),
            "plain torch": lambda: self._run(
                lambda *leaves: OPS.seam(*leaves, self._text("reference"))[:4]
            ),
            "inductor": lambda: self._run(torch.compile(self._equations, fullgraph=True)),
            "transformers": lambda: self._transformers(inductor=False),
            "transformers, inductor": lambda: self._transformers(inductor=True),
            "floor": self._floor,
        }
        made = {name: every[name]() for name in names}
        return {name: run for name, run in made.items() if run is not None}

    def _run(self, forward: Callable[..., Sequence[torch.Tensor]]) -> Run:
        return lambda: torch.autograd.grad(forward(*self.leaves), self.leaves, self.grads)

    def _text(self, kernels: str) -> str:
        return f"{self.spec.encode()} kernels={kernels}"

    def _halves(self, *leaves: torch.Tensor) -> Sequence[torch.Tensor]:
        text = self._text("cpp")
        X_next = OPS.post(*leaves[:4], text)
        return (X_next, *OPS.pre(X_next, *leaves[4:], text)[:3])

    def _equations(self, *leaves: torch.Tensor) -> Sequence[torch.Tensor]:
        X_next, u, h_post, h_res = seam_ref(*leaves, self.spec)
        return X_next, u, h_post, h_res

    def _transformers(self, *, inductor: bool) -> Run | None:
        """Their module after their mixing, as their decoder layer writes it."""
        try:
            code = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
        except ImportError:
            return None
        state, f, h_post, h_res = self.leaves[:4]
        config = SimpleNamespace(
            hc_mult=self.spec.streams,
            hc_sinkhorn_iters=self.spec.iters,
            hc_eps=1e-6,
            rms_norm_eps=self.spec.norm_eps,
            hidden_size=state.shape[-1],
        )
        module = code.DeepseekV4HyperConnection(config)
        for parameter in module.parameters():  # they come uninitialised
            torch.nn.init.normal_(parameter, std=0.02)

        def forward(
            X: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, comb: torch.Tensor
        ) -> Sequence[torch.Tensor]:
            X_next = h_post[..., None] * f[..., None, :] + comb.mT @ X
            next_post, next_comb, u = module(X_next)
            return X_next, u, next_post, next_comb

        leaves = [state, f, h_post, h_res, *module.parameters()]
        call = torch.compile(forward, fullgraph=True) if inductor else forward
        return lambda: torch.autograd.grad(call(*leaves[:4]), leaves, self.grads)

    def _floor(self) -> Run:
        state, f, phi = (self.leaves[i].detach() for i in (0, 1, 4))
        flat = state.flatten(0, 1).flatten(1)
        z, back, grad = flat @ phi, torch.empty_like(flat), torch.empty_like(phi)
        rows = torch.randn(_ROWS * f.shape[1], f.shape[2])
        copied = torch.empty_like(rows)

        def run() -> None:
            copied.copy_(rows)
            torch.mm(flat, phi, out=z)
            torch.mm(z, phi.mT, out=back)
            torch.mm(flat.mT, z, out=grad)

        return run


def measure(width: int, tokens: int, streams: int, repeat: int, names: Sequence[str]) -> list[Row]:
    """Times of each implementation over ``repeat`` rounds."""
    times = by_turns(_Seam(tokens, width, streams).runs(names), repeat)
    best = {name: min(values) for name, values in times.items()}
    floor, inductor = (best.get(name, float("nan")) for name in ("floor", "inductor"))
    return [
        Row(width, name, best[name], statistics.median(values), best[name] / floor,
            best[name] / inductor)
        for name, values in times.items()
    ]  # fmt: skip


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
    keep_freed_memory()
    rows = [
        row
        for width in options.widths
        for row in measure(width, options.tokens, options.streams, options.repeat, options.only)
    ]
    title = f"one seam, forward + backward, {options.tokens} tokens, {options.streams} streams"
    columns = ("width", "implementation", "min ms", "median ms", "to floor", "to Inductor")
    table = Table(*columns, title=title)
    for row in rows:
        times = (row.minimum, row.median, row.to_floor, row.to_inductor)
        table.add_row(str(row.width), row.implementation, *(f"{value:.2f}" for value in times))
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
