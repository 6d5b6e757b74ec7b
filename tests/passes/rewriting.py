"""Graphs with the inputs they were captured on, and the whole way from one to a widened graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.origins import part_origins
from mhc_compile.passes.plan import Plan, plan_trunks
from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.widen import SiteInputs, Widening, widen_trunks_pass

SPEC = SiteSpec(streams=3)


@dataclass
class Traced:
    """A captured graph, the values its placeholders had, and what the original returned."""

    gm: GraphModule
    inputs: list[Any]

    def run(self) -> tuple[Any, ...]:
        """The outputs, on copies of the inputs: a graph may write into them."""
        values = [v.clone() if isinstance(v, Tensor) else v for v in self.inputs]
        torch.manual_seed(0)
        return tuple(self.gm(*values))

    def gradients(self) -> list[Tensor | None]:
        """Gradients of a fixed function of all outputs, for every float input."""
        leaves = [_leaf(value) for value in self.inputs]
        values = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
        torch.manual_seed(0)
        outputs = [o for o in self.gm(*values) if isinstance(o, Tensor) and o.requires_grad]
        loss = sum((o.double() * output_weights(o)).sum() for o in outputs)
        wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))

    def ops(self) -> list[str]:
        """Names of all operations, in order."""
        return [op_name(node) for node in self.gm.graph.nodes if node.op.startswith("call")]


def traced(module: nn.Module, *args: Any, dynamic: bool | None = False) -> Traced:
    """The single Dynamo graph of a call, as a module of its own."""
    found: list[Traced] = []

    def collect(gm: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        copy, mapping = Graph(), dict[Node, Node]()
        copy.output(copy.graph_copy(gm.graph, mapping))
        for old, new in mapping.items():
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
        entry = Traced(GraphModule(gm, copy), [])
        found.append(entry)

        def run(*inputs: Any) -> Any:
            entry.inputs = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
            return gm(*inputs)

        return run

    torch._dynamo.reset()
    torch.compile(module, backend=collect, dynamic=dynamic, fullgraph=True)(*args)
    (only,) = found
    return only


def exported(module: nn.Module, *args: Any) -> Traced:
    """The graph of torch.export, which spells everything as ATen overloads."""
    program = torch.export.export(module, args, strict=False)
    return Traced(program.module(check_guards=False), list(args))


def planned(t: Traced, refused: Mapping[int, str] | None = None) -> Plan:
    """What would be rewritten, after canonicalization."""
    canonicalize_pass(t.gm, ())
    found = find_residuals(t.gm.graph)
    while part_origins(t.gm.graph, found):
        found = find_residuals(t.gm.graph)
    t.gm.graph.lint()
    return plan_trunks(t.gm.graph, found, refused or {})


def widen(
    t: Traced,
    spec: SiteSpec = SPEC,
    *,
    noise: float = 0.0,
    refused: Mapping[int, str] | None = None,
) -> Plan:
    """Rewrite ``t.gm`` in place, with parameters that preserve its outputs (plus ``noise``)."""
    plan = planned(t, refused)
    graph = t.gm.graph
    inputs = {}
    for site in plan.sites:
        own = SiteSpec(streams=spec.streams, constraint=spec.constraint, dim=site.dim)
        values = initial_parameters(own, site.width, index=site.step)
        holder = nn.Module()
        for name, value in values.items():
            noisy = value + noise * torch.randn(value.shape)
            holder.register_parameter(name, nn.Parameter(noisy))
        t.gm.add_module(f"site{site.index}", holder)
        with graph.inserting_before(next(iter(graph.nodes))):
            nodes = {name: graph.get_attr(f"site{site.index}.{name}") for name in values}
        inputs[site.index] = SiteInputs(
            f"site{site.index}", own, nodes["bias"], nodes["phi"], nodes["alpha"]
        )
    widening = Widening(plan, inputs)
    result = widen_trunks_pass(t.gm, (), widening=widening)
    assert result.modified == bool(plan.sites)
    graph.lint()
    t.gm.recompile()
    return plan


def relative(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = true.detach().double().abs().max().clamp_min(1e-12)
    return float((found.detach().double() - true.detach().double()).abs().max() / scale)


def assert_same(found: Any, true: Any, tolerance: float = 2e-6) -> None:
    """Compare outputs (or gradients, where None is a missing one) one by one."""
    assert len(found) == len(true)
    for a, b in zip(found, true, strict=True):
        assert (a is None) == (b is None)
        if isinstance(b, Tensor):
            assert isinstance(a, Tensor)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert relative(a, b) <= tolerance, relative(a, b)


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def output_weights(output: Tensor) -> Tensor:
    """Different for every element, so that no permutation of a gradient passes."""
    return torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).cos()
