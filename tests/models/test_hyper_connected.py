"""Real models that are hyper-connected by hand: recognised, and equal to what they were."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mhc_compile.kernels.spec import SiteSpec
from tests.passes.chain_graphs import Rewritten, assert_same, compare, compare_gradients, rewritten

WIDTH = 32


def _nudge(model: nn.Module, std: float = 0.1) -> None:
    """Away from the symmetric start, where streams are equal and many gradients zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


class _DeepSeekTrunk(nn.Module):
    """The hyper-connection modules of transformers around small branches."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        config = SimpleNamespace(
            hc_mult=n, hc_sinkhorn_iters=4, hc_eps=eps, rms_norm_eps=1e-5, hidden_size=WIDTH
        )
        self.n = n
        self.sites = nn.ModuleList(modeling.DeepseekV4HyperConnection(config) for _ in range(2))
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = modeling.DeepseekV4HyperHead(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.unsqueeze(2).expand(-1, -1, self.n, -1).contiguous()
        for site, branch in zip(self.sites, self.branches, strict=True):
            post, comb, u = site(state)
            f = torch.tanh(branch(u))
            state = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.transpose(-1, -2) @ state
        out = self.head(state)
        assert isinstance(out, torch.Tensor)
        return out


@pytest.mark.parametrize("n", [2, 4])
def test_the_modules_of_deepseek_v4_are_recognised_and_equal(n: int) -> None:
    pytest.importorskip("transformers")
    x = torch.randn(2, 5, WIDTH)
    found = assert_same(_DeepSeekTrunk(n, eps=1e-3), x, tolerance=5e-6)
    assert found.ops == ["expand", "pre", "post", "pre", "post", "collapse"]
    site = SiteSpec.decode(found.chains[1].what)
    assert (site.constraint, site.iters) == ("sinkhorn_softmax", 4)
    assert (site.sinkhorn_eps, site.pre_eps, site.norm_eps) == (1e-3, 1e-3, 1e-5)


def test_the_modules_of_deepseek_v4_are_recognised_in_an_exported_graph() -> None:
    pytest.importorskip("transformers")
    model, x = _DeepSeekTrunk(4, eps=1e-3), torch.randn(2, 5, WIDTH)
    module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    backend = Rewritten()
    backend.rewrite(module)
    assert backend.ops == ["expand", "pre", "post", "pre", "post", "collapse"]
    compare(module(x), model(x), 5e-6)


def _lucidrains(module: str, n: int, **settings: Any) -> Callable[..., Any]:
    library = pytest.importorskip(f"hyper_connections.{module}")
    make, expand, reduce = library.get_init_and_expand_reduce_stream_functions(
        n, dim=WIDTH, **settings
    )

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sites = nn.ModuleList(
                make(branch=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), layer_index=i)
                for i in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = expand(x)
            for site in self.sites:
                state = site(state)
            out = reduce(state)
            assert isinstance(out, torch.Tensor)
            return out

    return Trunk


@pytest.mark.parametrize("n", [2, 4])
def test_hyper_connections_of_lucidrains_are_recognised_whole(n: int) -> None:
    model = _lucidrains("hyper_connections", n)()
    _nudge(model)
    # In float64: the gradients of single numbers cancel to the rounding of float32.
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    found = assert_same(model.double(), x, tolerance=1e-9)
    assert found.ops == ["expand", "pre", "post", "pre", "post", "collapse"]
    assert SiteSpec.decode(found.chains[1].what).constraint == "none"


@pytest.mark.parametrize("module", ["manifold_constrained_hyper_connections", "mHCv2"])
@pytest.mark.parametrize("log_domain", [False, True])
def test_of_their_constrained_version_the_sinkhorn_becomes_an_op(
    module: str, log_domain: bool
) -> None:
    """Each stream is normed by itself but gated by a sigmoid: no op computes the whole."""
    make = _lucidrains(module, 4, sinkhorn_iters=3)
    if log_domain:
        make = _lucidrains(module, 4, sinkhorn_iters=3, log_domain_sinkhorn=True)
    model = make()
    _nudge(model)
    found = assert_same(model, torch.randn(2, 5, WIDTH), tolerance=5e-6)
    assert found.ops == ["sinkhorn", "sinkhorn"]
    assert all("gated by a sigmoid" in reason for reason in found.reasons)


def _causal_lm(name: str, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=WIDTH, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        max_position_embeddings=32, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if "hc" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def _step(call: Callable[..., Any], model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits and the gradients of all parameters that have one."""
    model.zero_grad()
    out = call(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_site_and_the_head_of_deepseek_v4_are_recognised(n: int) -> None:
    pytest.importorskip("transformers")
    model = _causal_lm("DeepseekV4", hc_mult=n, hc_sinkhorn_iters=20 if n == 4 else 4)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    plain, *right = _step(torch.compile(model, backend="eager"), model, ids)
    right = [gradient.clone() for gradient in right]
    backend = Rewritten()
    torch._dynamo.reset()
    logits, *mine = _step(torch.compile(model, backend=backend), model, ids)
    assert backend.ops == ["expand", *["pre", "post"] * 4, "collapse"]
    assert not backend.reasons
    compare(logits, plain, 5e-6)
    compare_gradients(mine, right, 5e-6)
    sites = [chain for chain in backend.chains if chain.kind == "site"]
    assert all(site.before > (150 if n == 4 else 50) and site.after < 20 for site in sites)


@pytest.mark.slow
def test_deepseek_v4_trains_alike_for_fifty_steps() -> None:
    pytest.importorskip("transformers")
    ids = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))

    def losses(backend: Any, nudge: float = 0.0) -> list[float]:
        model = _causal_lm("DeepseekV4", hc_mult=4, hc_sinkhorn_iters=5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        values = []
        for _ in range(50):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    def distance(ours: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(plain, ours, strict=True))

    plain = losses("eager")
    assert plain[-1] < 0.7 * plain[0]
    # Its router picks experts, so that rounding grows: weights off by one float32 step show by how
    # much without us.
    assert distance(losses(Rewritten())) < 2 * distance(losses("eager", nudge=1e-7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
def test_nothing_is_recognised_in_models_without_hyper_connections(name: str) -> None:
    from tests.models.zoo import build

    model, inputs = build(name)
    backend = rewritten(lambda: model(**inputs))
    assert backend.graphs
    assert backend.chains == []
    assert backend.ops == []
