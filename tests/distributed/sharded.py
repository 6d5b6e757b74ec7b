"""What the ranks of the DTensor tests do: each op on tensors sharded over tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import mhc_compile.distributed  # noqa: F401 - registers the rules
from mhc_compile.kernels.init import initial_head, initial_parameters
from mhc_compile.kernels.spec import SiteSpec

CASES: dict[str, dict[str, Any]] = {
    "tokens last": {},
    "channels first": {"dim": -3},
    "static": {"dynamic": False},
    "no mixing": {"constraint": "identity"},
    "single pass": {"single_pass": True},
    "single pass, static": {"single_pass": True, "dynamic": False},
}


def _parameters(spec: SiteSpec, made: dict[str, Tensor]) -> list[Tensor | None]:
    moved = {name: value + 0.3 * torch.randn(value.shape) for name, value in made.items()}
    return [moved.get(name) for name in ("phi", "bias", "alpha")]


def _network(x: Tensor, f: Tensor, site: list[Any], head: list[Any], spec: SiteSpec) -> Tensor:
    """Every op that a kind of site has: expand, pre, seam, post, collapse or read."""
    ops, text = torch.ops.mhc, spec.encode()
    X = ops.expand(x, spec.streams, spec.dim)
    u, h_post, h_res, _ = ops.pre(X, *site, text)
    if spec.single_pass:
        X, u, h_post, h_res, _ = ops.seam(X, torch.tanh(u) * f, h_post, h_res, *site, text)
        X = ops.post(X, torch.sin(u), h_post, h_res, text)
        u, h_post, h_res, _ = ops.pre(X, *site, text, h_post)
        return ops.read(ops.post(X, torch.sin(u), h_post, h_res, text), h_post, text)
    X, u, h_post, h_res, _ = ops.seam(X, torch.tanh(u) * f, h_post, h_res, *site, text)
    X = ops.post(X, torch.sin(u), h_post, h_res, text)
    return ops.collapse(X, *head, "learned", text) + ops.collapse(X, None, None, None, "mean", text)


def _run(leaves: list[Tensor | None], spec: SiteSpec) -> list[Tensor]:
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    x, f, *parameters = leaves
    assert x is not None
    assert f is not None
    out = _network(x, f, parameters[:3], parameters[3:], spec)
    (out * out.cos()).sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    return [out.detach(), *gradients]


def distances(rank: int, case: str) -> list[float]:
    """Of the output and of every gradient from those of whole tensors."""
    del rank
    spec = SiteSpec(streams=4, kernels="reference", **CASES[case])
    shape, sharded = ((2, 8, 4, 6), 2) if spec.dim == -3 else ((2, 6, 8), 1)
    x, f = torch.randn(shape), torch.randn(shape)
    parameters = [
        *_parameters(spec, initial_parameters(spec, 8)),
        *_parameters(spec, {} if spec.single_pass else initial_head(spec, 8)),
    ]
    leaves = [x, f, *parameters]
    whole = _run([None if leaf is None else leaf.clone() for leaf in leaves], spec)
    mesh = init_device_mesh("cpu", (2,))
    placed = [
        None
        if leaf is None
        else distribute_tensor(leaf, mesh, [Shard(sharded) if number < 2 else Replicate()])
        for number, leaf in enumerate(leaves)
    ]
    found: list[Any] = _run(placed, spec)
    assert len(found) == len(whole) == 1 + sum(leaf is not None for leaf in leaves)
    assert [tensor.placements for tensor in found[:3]] == [(Shard(sharded),)] * 3  # never gathered
    result = []
    for mine, other in zip(found, whole, strict=True):
        result.append(float((mine.full_tensor() - other).abs().max() / other.abs().max()))
    return result
