"""A small rewritten network, put together by hand from mhc ops."""

import torch
from torch import fx, nn

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec

WIDTH = 6


def rewritten_network(spec: SiteSpec, *, trunks: tuple[int, ...] = (2,)) -> fx.GraphModule:
    """Trunks of ``tanh(linear(u))`` sites, one behind the other.

    Args:
        spec: of every site; channels are the last axis, of size `WIDTH`.
        trunks: number of sites of each trunk.
    """
    root, graph = nn.Module(), fx.Graph()
    ops, text = torch.ops.mhc, spec.encode()
    value = graph.placeholder("x")
    for trunk, sites in enumerate(trunks):
        state = graph.call_function(ops.expand.default, (value, spec.streams, spec.dim))
        for index in range(sites):
            name = f"t{trunk}_s{index}"
            site = nn.Module()
            for key, tensor in initial_parameters(spec, WIDTH, index=index).items():
                site.register_parameter(key, nn.Parameter(tensor))
            owner = nn.Linear(WIDTH, WIDTH)
            owner.mhc = nn.ModuleDict({"add0": site})
            setattr(root, name, owner)
            read = {
                key: graph.get_attr(f"{name}.mhc.add0.{key}") if hasattr(site, key) else None
                for key in ("phi", "bias", "alpha")
            }
            pre = graph.call_function(ops.pre.default, (state, *read.values(), text))
            u, h_post, h_res = (graph.call_function(_item, (pre, i)) for i in range(3))
            branch = graph.call_function(torch.tanh, (graph.call_module(name, (u,)),))
            # The detour through float32 is what norms of real models do.
            branch = graph.call_method("to", (branch,), {"dtype": torch.float32})
            state = graph.call_function(ops.post.default, (state, branch, h_post, h_res, text))
        value = graph.call_function(
            ops.collapse.default, (state, None, None, None), {"mode": "mean", "spec": text}
        )
    graph.output((value,))
    graph.lint()
    return fx.GraphModule(root, graph)


def _item(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    return values[index]
