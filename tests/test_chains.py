"""The backend, explain and rewrite on models that are hyper-connected by hand."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile.convert import is_converted
from mhc_compile.errors import MHCWarning
from mhc_compile.passes.opnames import raw_name
from mhc_compile.tables import report_text, summary_line
from tests.passes.chain_graphs import compare, compare_gradients, run
from tests.passes.hyper_spellings import EPS, C, DeepSeek, Distilled, N, Site


class Hyper(nn.Module):
    """Expand, two sites, mean."""

    def __init__(self, kind: type[Site] = DeepSeek, sites: int = 2) -> None:
        super().__init__()
        self.sites = nn.ModuleList(kind() for _ in range(sites))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.unsqueeze(-2).expand(-1, -1, N, -1)
        for site in self.sites:
            state = site(state)
        return state.mean(-2)


class Mixed(nn.Module):
    """A plain residual trunk before a hyper-connected one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C)) for _ in range(2)
        )
        self.hyper = Hyper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.plain:
            x = x + torch.tanh(layer(x))
        out = self.hyper(x)
        assert isinstance(out, torch.Tensor)
        return out


def _input(batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, length, C, generator=generator, dtype=dtype)


def _compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    settings = {"inner": "aot_eager", "kernels": "reference", **options}
    return torch.compile(model, backend="mhc", options=settings)


def _same(model: nn.Module, x: torch.Tensor, tolerance: float = 5e-6, **options: Any) -> None:
    right, right_gradients = run(model, model, x)
    mine, my_gradients = run(_compiled(model, **options), model, x)
    compare(mine, right, tolerance)
    compare_gradients(my_gradients, right_gradients, tolerance)


def test_a_hyper_connected_model_compiles_without_conversion_or_warning() -> None:
    model = Hyper()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        _same(model, _input())
    assert not is_converted(model)


def test_it_runs_without_an_inner_compiler() -> None:
    _same(Hyper(sites=1), _input(), inner="eager")


@pytest.mark.slow
def test_it_runs_under_inductor_with_generated_kernels() -> None:
    _same(Hyper(sites=1), _input(), inner="inductor", kernels="cpp")


def test_inference_takes_the_ops_as_well() -> None:
    model, x = Hyper(), _input()
    with torch.no_grad():
        compare(_compiled(model)(x), model(x), 2e-6)


def test_a_teacher_under_no_grad_is_recognised_too_and_gets_no_gradient() -> None:
    _same(Distilled(Hyper()), _input())
    report = mhc_compile.explain(Distilled(Hyper()), _input())
    assert [chain.kind for chain in report.chains] == ["expand", "site", "site", "collapse"] * 2


def test_a_batch_of_one_and_a_single_token_work() -> None:
    model = Hyper(sites=1)
    for batch, length in ((1, 5), (2, 1), (1, 1)):
        _same(model, _input(batch, length))


def test_autocast_keeps_the_coefficients_in_float32() -> None:
    model, x = Hyper(sites=1), _input()
    exact = model(x)

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        assert isinstance(out, torch.Tensor)
        return out

    mine, right = _compiled(call)(x), call(x)
    compare(mine.float(), right.float(), 5e-2)
    # What the source computes in bfloat16, the ops do in float32.
    assert (mine - exact).norm() <= (right - exact).norm()


def test_a_half_precision_model_is_at_least_as_close_to_float32_as_its_source() -> None:
    model = Hyper(sites=1)
    x = _input().bfloat16().float()
    exact = model.bfloat16().float()(x)
    half = model.bfloat16()
    right, mine = half(x.bfloat16()), _compiled(half)(x.bfloat16())
    assert mine.dtype == torch.bfloat16
    assert (mine - exact).norm() <= 1.1 * (right - exact).norm()


def test_blocks_compiled_one_by_one_hand_their_streams_on() -> None:
    model, x = Hyper(), _input()
    right, right_gradients = run(model, model, x)
    torch._dynamo.reset()
    for site in model.sites:
        site.compile(backend="mhc", options={"inner": "aot_eager", "kernels": "reference"})
    mine, my_gradients = run(model, model, x)
    compare(mine, right, 5e-6)
    compare_gradients(my_gradients, right_gradients, 5e-6)


def test_checkpointed_sites_are_recognised() -> None:
    model, x = Hyper(), _input()

    def call(x: torch.Tensor) -> torch.Tensor:
        state = x.unsqueeze(-2).expand(-1, -1, N, -1)
        for site in model.sites:
            state = checkpoint(site, state, use_reentrant=False)  # type: ignore[assignment]
        return state.mean(-2)

    right, right_gradients = run(call, model, x)
    mine, my_gradients = run(_compiled(call), model, x)
    compare(mine, right, 5e-6)
    compare_gradients(my_gradients, right_gradients, 5e-6)


def test_a_plain_trunk_elsewhere_in_the_model_is_widened() -> None:
    model, x = Mixed(), _input()
    right = model(x)
    config = mhc_compile.MHCConfig(kernels="reference")
    report = mhc_compile.convert_(model, x, config=config)
    assert [site.name for site in report.converted] == ["add0", "add1"]
    assert [chain.kind for chain in report.chains] == ["expand", "site", "site", "collapse"]
    compare(_compiled(model)(x), right, 2e-6)


def test_a_plain_trunk_is_found_on_the_first_call_too() -> None:
    model, x = Mixed(), _input()
    right = model(x)
    with pytest.warns(MHCWarning, match="2 sites in 1 trunks"):
        compare(_compiled(model)(x), right, 2e-6)


def test_a_residual_inside_the_branch_of_a_site_is_part_of_that_branch() -> None:
    class Inner(Site):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pre, post, res = self.logits(x)
            h_pre, h_post = self.gates(pre, post)
            u = self.read(h_pre, x)
            for _ in range(2):
                u = u + torch.tanh(self.branch(u))
            return self.write(x, u, h_post, self.mixing(res))

    model = Hyper(Inner)
    report = mhc_compile.explain(model, _input())
    assert report.sites == ()
    assert {add.clause for add in report.rejected} == {"already hyper-connected"}
    assert sum(chain.kind == "site" for chain in report.chains) == 2


def test_explain_names_what_it_recognised_and_counts_operations() -> None:
    report = mhc_compile.explain(Hyper(), _input())
    expand, first, second, collapse = report.chains
    assert (expand.kind, first.kind, collapse.kind) == ("expand", "site", "collapse")
    assert first.what == f"n=4 constraint=sinkhorn_softmax iters=2 sinkhorn_eps={EPS} " + (
        f"pre_eps={EPS} norm_eps=0.01"
    )
    assert first.source.startswith("hyper_spellings.py:")
    assert not first.reason
    assert second.operations[0] > 2.5 * second.operations[1] > 0
    assert collapse.what == "mean"
    assert "4 hand-written pieces of hyper-connections replaced" in summary_line(report)
    assert first.what in report_text(report)


def test_explain_says_why_a_site_stays() -> None:
    class NotNormed(DeepSeek):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.flatten(-2), self.fn)

    report = mhc_compile.explain(Hyper(NotNormed, 1), _input())
    left = [chain for chain in report.chains if chain.reason]
    assert [chain.kind for chain in left] == ["site"]
    assert "normed" in left[0].reason
    assert "left: a coefficient is a projection" in report_text(report)


def test_rewrite_recognises_the_exported_graph() -> None:
    model, x = Hyper(), _input()
    module = mhc_compile.rewrite(model, x)
    names = [raw_name(node) for node in module.graph.nodes]
    assert next(n for n in names if n.startswith("mhc.")) == "mhc.expand"
    assert "softmax" not in names
    assert "mhc.collapse" in names
    compare(module(x), model(x), 2e-6)
    assert set(module.state_dict()) == set(model.state_dict())


def test_stability_measures_sites_of_the_models_own() -> None:
    report = mhc_compile.stability(Hyper(), _input())
    assert [site.name.partition(":")[0] for site in report.sites] == ["hyper_spellings.py"] * 2
    # eps in every division keeps rows a little below 1
    assert all(0.9 < site.mixing.forward_gain <= 1.0 for site in report.sites)
