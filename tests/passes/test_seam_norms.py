"""`join_norms_pass`: the norms it knows, what it leaves alone and why, that nothing changes."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.recompute import tag_recompute_pass
from mhc_compile.passes.seam_norms import join_norms_pass
from mhc_compile.passes.seams import join_seams_pass
from mhc_compile.passes.states import SEAM_NORM, spec_of, trunk_of_states
from tests.passes.rewriting import Traced, assert_same, exported, traced, widen

WIDTH = 8
EPS = 2e-3
Norm = Callable[["Branch", Tensor], Tensor]


def llama(m: "Branch", x: Tensor) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return m.weight * x.to(dtype)


def late(m: "Branch", x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * (wide * wide).mean(dim=-1, keepdim=True).add(EPS).rsqrt()
    return (wide * m.weight).type_as(x)


def gemma(m: "Branch", x: Tensor) -> Tensor:
    wide = x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (out * (1.0 + m.weight.float())).type_as(x)


def by_root(m: "Branch", x: Tensor) -> Tensor:
    return x / torch.sqrt(EPS + torch.mean(x**2, [-1], True)) * m.weight


def bare(m: "Branch", x: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,))


KNOWN: dict[str, tuple[Norm, str]] = {
    "nn.LayerNorm": (lambda m, x: m.layer(x), "layer"),
    "nn.RMSNorm": (lambda m, x: m.rms(x), "rms"),
    "layer_norm without weights": (lambda m, x: F.layer_norm(x, (WIDTH,), eps=EPS), "layer"),
    "rms_norm without weights": (bare, "rms"),
    "Llama": (llama, "rms"),
    "weight before the cast": (late, "rms"),
    "1 + weight": (gemma, "rms"),
    "a division by the root": (by_root, "rms"),
}

UNKNOWN: dict[str, tuple[Norm, str]] = {
    "no norm": (lambda m, x: x.tanh(), "starts with no norm"),
    "read twice": (lambda m, x: m.layer(x) + x, "no norm that is known"),
    "batch of channels": (lambda m, x: F.layer_norm(x, (3, WIDTH)), "other axes"),
    "a part is read": (
        lambda m, x: m.weight * x * (r := torch.rsqrt(x.pow(2).mean(-1, True) + EPS)) + r,
        "no norm that is known",
    ),
    "the mean of all": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS),
        "no norm that is known",
    ),
    "another cast": (lambda m, x: F.rms_norm(x.double(), (WIDTH,), eps=EPS).float(), "no norm"),
    "a cube": (
        lambda m, x: x * torch.rsqrt(x.pow(3).abs().mean(-1, True) + EPS),
        "no norm that is known",
    ),
}


class Branch(nn.Module):
    """A norm, a product, a bend."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.layer, self.rms = nn.LayerNorm(WIDTH, eps=EPS), nn.RMSNorm(WIDTH, eps=EPS)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.layer.weight.uniform_(0.5, 1.5)
            self.layer.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(self, x)))


class Stack(nn.Module):
    """A trunk of three sites."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(norm) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def seams(norm: Norm, trace: Any = traced, dtype: torch.dtype = torch.float32) -> Traced:
    """The graph with its seams, and norms apart."""
    torch.manual_seed(0)
    t = trace(Stack(norm).to(dtype), torch.randn(2, 3, WIDTH).to(dtype))
    widen(t, noise=0.1)
    assert join_seams_pass(t.gm, ()).modified
    t.gm.recompile()
    return t


def join(t: Traced) -> bool:
    modified = join_norms_pass(t.gm, ()).modified
    t.gm.graph.lint()
    t.gm.recompile()
    return modified


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    of_pass = (r for r in caplog.records if r.name == join_norms_pass.__module__)
    return [record.getMessage() for record in of_pass]


def joined(t: Traced) -> list[SiteSpec]:
    found = t.gm.graph.find_nodes(op="call_function", target=SEAM_NORM)
    return [spec_of(node) for node in found]


@pytest.mark.parametrize(
    ("name", "trace"),
    [(name, traced) for name in KNOWN]
    # In an exported graph a cast that changes nothing is on the trunk, and keeps seams apart.
    + [(name, exported) for name in KNOWN if name.startswith(("nn.", "rms_norm", "a division"))],
)
def test_every_known_norm_is_joined_and_changes_nothing(name: str, trace: Any) -> None:
    norm, kind = KNOWN[name]
    t = seams(norm, trace)
    outputs, gradients = t.run(), t.gradients()
    assert join(t)
    eps = torch.finfo(torch.float32).eps if norm is bare else EPS
    assert [(s.branch_norm, s.branch_eps, s.branch_rounds) for s in joined(t)] == [
        (kind, eps, False)
    ] * 2
    assert_same(t.run(), outputs, 1e-6)
    assert_same(t.gradients(), gradients, 1e-5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_branches_are_left_alone_with_a_reason(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    norm, reason = UNKNOWN[name]
    t = seams(norm)
    before = str(t.gm.graph)
    with caplog.at_level(logging.INFO):
        assert not join(t)
    assert str(t.gm.graph) == before
    assert [reason in given for given in reasons(caplog)] == [True, True]


@pytest.mark.parametrize(
    ("norm", "rounds"),
    [(llama, True), (late, False), (gemma, False), (KNOWN["nn.LayerNorm"][0], False)],
)
def test_half_streams_keep_the_place_of_every_rounding(norm: Norm, rounds: bool) -> None:
    t = seams(norm, dtype=torch.bfloat16)
    outputs = t.run()
    assert join(t)
    assert [s.branch_rounds for s in joined(t)] == [rounds] * 2
    ours, plain = t.run()[0], outputs[0]
    # Sums over channels are made in another order, which may flip a rounding here and there.
    assert (ours == plain).float().mean() > 0.95


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (by_root, "computed in torch.bfloat16"),
        (bare, "without an eps"),
        (lambda m, x: F.rms_norm(x.float(), (WIDTH,), eps=EPS).to(x.dtype), "no norm"),
    ],
)
def test_norms_that_compute_in_half_precision_are_left_alone(
    norm: Norm, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    t = seams(norm, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO):
        assert not join(t)
    assert [reason in given for given in reasons(caplog)] == [True, True]


def test_a_second_run_changes_nothing() -> None:
    t = seams(llama)
    assert join(t)
    before = str(t.gm.graph)
    assert join_norms_pass(t.gm, ()) == PassResult(t.gm, False)
    assert str(t.gm.graph) == before


def test_sites_that_are_made_again_keep_their_norms(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    t = traced(Stack(llama), torch.randn(2, 3, WIDTH))
    widen(t, noise=0.1)
    assert tag_recompute_pass(t.gm, (), length=3).modified
    assert join_seams_pass(t.gm, ()).modified
    with caplog.at_level(logging.INFO):
        assert not join(t)
    assert ["made again in the backward" in given for given in reasons(caplog)] == [True, True]


def test_the_trunk_goes_on_through_joined_seams() -> None:
    t = seams(llama)
    states = len(trunk_of_states(t.gm.graph))
    assert join(t)
    assert len(trunk_of_states(t.gm.graph)) == states


def test_new_nodes_carry_the_source_and_name_of_the_site_they_leave() -> None:
    t = seams(llama)
    (seam, *_) = t.gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.seam.default)
    trace, site = seam.meta["stack_trace"], seam.meta["custom"]
    assert join(t)
    (node, *_) = t.gm.graph.find_nodes(op="call_function", target=SEAM_NORM)
    assert (node.meta["stack_trace"], node.meta["custom"]) == (trace, site)
