"""Time of the graph passes over the size of the graph: is it linear, is it fast?

    python -m benchmarks.passes [--layers 100 200 400] [--repeat 5] [--json FILE]

Canonicalize, chains, find, plan, widen, recompute and seams run one after the other on the graph of
a Llama-like decoder. It is written node by node (61 nodes and two residual sites a layer), so that
no model has to be built or captured. Each time is the best of the repetitions.
"""

import argparse
import json
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx import Graph, GraphModule, Node

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.chains import rewrite_chains_pass
from mhc_compile.passes.plan import Plan, plan_trunks
from mhc_compile.passes.recompute import tag_recompute_pass
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.seams import join_seams_pass
from mhc_compile.passes.widen import SiteInputs, Widening, widen_trunks_pass

_WIDTH, _HEADS, _HIDDEN = 64, 4, 96
_TOKENS = (2, 16)


_PASSES = ("canonicalize", "chains", "find", "plan", "widen", "recompute", "seams")


@dataclass(frozen=True, slots=True)
class Row:
    """One size of graph; times in seconds."""

    layers: int
    nodes: int
    sites: int
    canonicalize: float
    chains: float
    find: float
    plan: float
    widen: float
    recompute: float
    seams: float

    @property
    def total(self) -> float:
        """All passes together."""
        return sum(getattr(self, name) for name in _PASSES)


class _Decoder:
    """Builds the graph; every node carries its shape as a meta tensor."""

    def __init__(self, layers: int) -> None:
        self.graph = Graph()
        self._inputs = 0
        x = self._input(*_TOKENS, _WIDTH)
        tables = (self._input(1, 1, _TOKENS[1], 16), self._input(1, 1, _TOKENS[1], 16))
        for _ in range(layers):
            x = self._layer(x, *tables)
        self.graph.output((self._norm(x),))

    def _value(self, node: Node, value: object) -> Node:
        node.meta["example_value"] = value
        return node

    def _input(self, *shape: int) -> Node:
        return self._placeholder(torch.empty(shape, device="meta"))

    def _weight(self, *shape: int) -> Node:
        return self._placeholder(nn.Parameter(torch.empty(shape, device="meta")))

    def _placeholder(self, value: torch.Tensor) -> Node:
        self._inputs += 1
        return self._value(self.graph.placeholder(f"in{self._inputs}"), value)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        values = torch.fx.node.map_arg(args, lambda node: node.meta["example_value"])
        node = self.graph.call_function(function, args, kwargs)
        return self._value(node, function(*values, **kwargs))

    def _norm(self, x: Node) -> Node:
        wide = self._call(torch.Tensor.to, x, torch.float32)
        mean = self._call(torch.mean, self._call(torch.pow, wide, 2), -1, keepdim=True)
        scale = self._call(torch.rsqrt, self._call(operator.add, mean, 1e-6))
        normed = self._call(torch.Tensor.to, self._call(operator.mul, wide, scale), torch.float32)
        return self._call(operator.mul, self._weight(_WIDTH), normed)

    def _project(self, x: Node, width: int) -> Node:
        return self._call(F.linear, x, self._weight(width, x.meta["example_value"].shape[-1]))

    def _heads(self, x: Node) -> Node:
        split = self._call(torch.reshape, self._project(x, _WIDTH), (*_TOKENS, _HEADS, -1))
        return self._call(torch.transpose, split, 1, 2)

    def _rotate(self, x: Node, cos: Node, sin: Node) -> Node:
        left = self._call(operator.getitem, x, (..., slice(None, 8)))
        right = self._call(operator.getitem, x, (..., slice(8, None)))
        turned = self._call(torch.cat, [self._call(operator.neg, right), left], -1)
        straight = self._call(operator.mul, x, cos)
        return self._call(operator.add, straight, self._call(operator.mul, turned, sin))

    def _layer(self, x: Node, cos: Node, sin: Node) -> Node:
        normed = self._norm(x)
        query, key = (self._rotate(self._heads(normed), cos, sin) for _ in range(2))
        mixed = self._call(F.scaled_dot_product_attention, query, key, self._heads(normed))
        joined = self._call(torch.reshape, self._call(torch.transpose, mixed, 1, 2), (*_TOKENS, -1))
        x = self._call(operator.add, x, self._project(joined, _WIDTH))
        normed = self._norm(x)
        gate = self._call(F.silu, self._project(normed, _HIDDEN))
        hidden = self._call(operator.mul, gate, self._project(normed, _HIDDEN))
        return self._call(operator.add, x, self._project(hidden, _WIDTH))


def _widening(graph: Graph, plan: Plan) -> Widening:
    """Placeholders for the parameters of every planned site."""
    inputs = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        for planned in plan.sites:
            spec = SiteSpec(streams=4, dim=planned.dim)
            bias, phi, alpha = (
                graph.placeholder(f"{name}{planned.index}") for name in ("bias", "phi", "alpha")
            )
            inputs[planned.index] = SiteInputs(f"add{planned.index}", spec, bias, phi, alpha)
    return Widening(plan, inputs)


def measure(layers: int, repeat: int) -> Row:
    """Best time of each pass over ``repeat`` runs on a decoder of ``layers`` layers."""
    decoder = _Decoder(layers).graph
    best = [float("inf")] * len(_PASSES)
    sites = 0
    for _ in range(repeat):
        graph = Graph()
        graph.output(graph.graph_copy(decoder, {}))
        gm = GraphModule(nn.Module(), graph)
        marks = [time.perf_counter()]
        canonicalize_pass(gm, ())
        marks.append(time.perf_counter())
        rewrite_chains_pass(gm, (), kernels="auto", found=[])
        marks.append(time.perf_counter())
        found = find_residuals(gm.graph)
        marks.append(time.perf_counter())
        plan = plan_trunks(gm.graph, found, {})
        marks.append(time.perf_counter())
        widening = _widening(gm.graph, plan)
        spent = [after - before for before, after in pairwise(marks)]
        marks = [time.perf_counter()]
        widen_trunks_pass(gm, (), widening=widening)
        marks.append(time.perf_counter())
        tag_recompute_pass(gm, ())
        marks.append(time.perf_counter())
        join_seams_pass(gm, ())
        marks.append(time.perf_counter())
        spent += [after - before for before, after in pairwise(marks)]
        best = list(map(min, best, spent))
        sites = len(plan.sites)
    return Row(layers, len(decoder.nodes), sites, *best)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = [measure(layers, options.repeat) for layers in options.layers]
    table = Table(title="graph passes, milliseconds")
    for name in ("layers", "nodes", "sites", *_PASSES, "total"):
        table.add_column(name, justify="right")
    table.add_column("us per node", justify="right")
    for row in rows:
        counts = (row.layers, row.nodes, row.sites)
        times = (*(getattr(row, name) for name in _PASSES), row.total)
        per_node = f"{row.total / row.nodes * 1e6:.1f}"
        table.add_row(*map(str, counts), *(f"{1e3 * seconds:.0f}" for seconds in times), per_node)
    Console().print(table)
    if options.json is not None:
        entries = [{**asdict(row), "total": row.total} for row in rows]
        options.json.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
