"""Hand-written hyper-connections: backend "mhc" against plain Inductor, on the CPU.

    python -m benchmarks.chains [--only site trunk model] [--iters 20] [--repeat 20] [--json FILE]

Three subjects: one site as transformers' DeepSeek-V4 writes it (its module, a pointwise branch, the
merge), a trunk of four of them, and a training step of a small ``DeepseekV4ForCausalLM``. Each runs
by turns in one process on one thread: with ``torch.compile(model)``, and with
``torch.compile(model, backend="mhc")``, which recognises the sites and is told nothing; once as it
is by default, which saves memory by recomputing, and once keeping everything. What no backend can
save is the rest of the model: its branches on plain residual adds, through Inductor.
Times are CPU time of the thread. Compilation is the first step in a new process whose caches are
empty but for what Inductor finds out about the machine at its first use, on the clock on the wall,
for its C++ compilers are other processes; ``--compile`` says how often. The number of graph nodes
is that of the captured graph before and after.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.timing import by_turns, in_cold_process, keep_freed_memory, machine

_REST = "inductor, the rest alone"
_BACKENDS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "mhc": {"backend": "mhc"},
    "mhc, nothing recomputed": {"backend": "mhc", "options": {"recompute": "off"}},
    _REST: {"backend": "inductor"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One subject under one backend."""

    subject: str
    backend: str
    compile_s: float
    minimum_ms: float
    median_ms: float
    nodes: int
    """Calls in the graphs that are compiled."""


class SiteStep(nn.Module):
    """One DeepSeek-V4 site around ``tanh``."""

    def __init__(self, width: int, streams: int, iters: int) -> None:
        super().__init__()
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        self.connection = modeling.DeepseekV4HyperConnection(
            SimpleNamespace(
                hc_mult=streams,
                hc_sinkhorn_iters=iters,
                hc_eps=1e-6,
                rms_norm_eps=1e-6,
                hidden_size=width,
            )
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """``[B, T, n, C]`` to the next state."""
        post, comb, u = self.connection(state)
        written = post.unsqueeze(-1) * torch.tanh(u).unsqueeze(-2)
        out = written + torch.matmul(comb.transpose(-1, -2), state)
        assert isinstance(out, torch.Tensor)
        return out


class PlainLayer(nn.Module):
    """A DeepSeek-V4 layer with its sites taken out: both branches read the first stream."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norms = nn.ModuleList((layer.input_layernorm, layer.post_attention_layernorm))

    def forward(self, state: torch.Tensor, input_ids: Any = None, **settings: Any) -> torch.Tensor:
        """``[B, T, n, C]`` to the next state."""
        branch, _ = self.attention(self.norms[0](state[..., 0, :]), **settings)
        state = state + branch.unsqueeze(-2)
        branch = self.mlp(self.norms[1](state[..., 0, :]), input_ids=input_ids)
        return state + branch.unsqueeze(-2)


Step = Callable[[Any], object]
"""Forward and backward through a compiled model."""


def sites_subject(options: argparse.Namespace, sites: int) -> tuple[nn.Module, Step]:
    """Some sites, and the gradients of their state and parameters for a given gradient."""
    model = nn.Sequential(*(SiteStep(options.width, 4, options.iters) for _ in range(sites)))
    state = torch.randn(1, options.tokens, 4, options.width, requires_grad=True)
    leaves, grad = [state, *model.parameters()], torch.randn_like(state)
    return model, lambda call: torch.autograd.grad(call(state), leaves, grad)


def model_subject(options: argparse.Namespace) -> tuple[nn.Module, Step]:
    """A small DeepSeek-V4 language model, and the gradients of its loss."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=256, hidden_size=256, moe_intermediate_size=128, num_attention_heads=4,
        num_hidden_layers=options.layers, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, max_position_embeddings=512, hc_mult=4,
        hc_sinkhorn_iters=options.iters,
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config)
    ids = torch.randint(0, 256, (1, 256))

    def step(call: Any) -> object:
        loss = call(input_ids=ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    return model, step


_SUBJECTS: Mapping[str, Callable[[argparse.Namespace], Any]] = {
    "site": functools.partial(sites_subject, sites=1),
    "trunk": functools.partial(sites_subject, sites=4),
    "model": model_subject,
}
_SIZES = {"width": 512, "tokens": 1024, "layers": 2, "iters": 20}


def first_step(subject: str, backend: str, sizes: Mapping[str, int]) -> tuple[float]:
    """Seconds of the first step, which compiles."""
    torch.set_num_threads(1)
    torch.compile(torch.tanh)(torch.ones(64, requires_grad=True)).sum().backward()
    step = _step(subject, backend, argparse.Namespace(**sizes))
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start,)


def measure(subject: str, options: argparse.Namespace) -> list[Row]:
    """Compile one subject with each backend, then time its steps by turns."""
    backends = [name for name in _BACKENDS if subject == "model" or name != _REST]
    sizes = {name: getattr(options, name) for name in _SIZES}
    compiling: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(options.compile):
        for name in backends:
            call = f"first_step({subject!r}, {name!r}, {sizes})"
            compiling[name] += in_cold_process("benchmarks.chains", call)
    before, after = count_nodes(*_SUBJECTS[subject](options))
    times = by_turns({name: _step(subject, name, options) for name in backends}, options.repeat)
    nodes = {"inductor": before, _REST: 0}
    return [
        Row(
            subject,
            name,
            statistics.median(compiling[name]) if compiling[name] else math.nan,
            min(values),
            statistics.median(values),
            nodes.get(name, after),
        )
        for name, values in times.items()
    ]


def _step(subject: str, backend: str, options: argparse.Namespace) -> Callable[[], object]:
    torch.manual_seed(0)
    model, run = _SUBJECTS[subject](options)
    if backend == _REST:
        model.model.layers = nn.ModuleList(map(PlainLayer, model.model.layers))
    return functools.partial(run, torch.compile(model, **_BACKENDS[backend]))


def count_nodes(model: nn.Module, run: Step) -> tuple[int, int]:
    """Calls in the captured graphs, before and after the recognised pieces are replaced."""
    from mhc_compile._torch_private import copy_captured
    from mhc_compile.passes.canonicalize import canonicalize_pass
    from mhc_compile.passes.chains import rewrite_chains_pass

    counts = [0, 0]

    def calls(gm: torch.fx.GraphModule) -> int:
        return sum(node.op.startswith("call") for node in gm.graph.nodes)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        copy, _ = copy_captured(gm)
        canonicalize_pass(copy, ())
        counts[0] += calls(copy)
        rewrite_chains_pass(copy, (), kernels="auto", found=[])
        counts[1] += calls(copy)
        return gm.forward

    torch._dynamo.reset()
    run(torch.compile(model, backend=backend))
    return counts[0], counts[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tuple(_SUBJECTS), default=tuple(_SUBJECTS))
    for name, size in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--compile", type=int, default=1, metavar="TIMES")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [row for subject in options.only for row in measure(subject, options)]
    columns = ("subject", "backend", "compile s", "min ms", "median ms", "graph nodes")
    table = Table(*columns, title=f"forward + backward, {options.iters} Sinkhorn iterations")
    for row in rows:
        numbers = (f"{n:.2f}" for n in (row.compile_s, row.minimum_ms, row.median_ms))
        table.add_row(row.subject, row.backend, *numbers, str(row.nodes))
    Console().print(table)
    if options.json is not None:
        setting = {name: getattr(options, name) for name in _SIZES}
        found = [asdict(row) for row in rows]
        result = {"machine": machine(), "setting": setting, "rows": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
