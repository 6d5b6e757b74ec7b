"""Hand-written sites become mhc ops, however they are spelt; near misses stay what they are."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mhc_compile.kernels.spec import SiteSpec
from tests.passes import hyper_spellings as near
from tests.passes.chain_graphs import Rewritten, assert_same, rewritten
from tests.passes.hyper_spellings import EPS, NORM_EPS, SPELLINGS, C, DeepSeek, N, Site


def _state(n: int = N, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, n, C, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda kind: kind.__name__)
def test_every_spelling_becomes_one_pre_and_one_post(spelling: type[Site]) -> None:
    found = assert_same(spelling().double(), _state(), tolerance=1e-9)
    assert found.ops == ["pre", "post"]
    assert found.kinds == ["site"]
    assert not found.reasons
    spec = SiteSpec.decode(found.chains[0].what)
    assert spec.constraint == SPELLINGS[spelling]
    assert spec.norm_eps == pytest.approx(NORM_EPS, rel=1e-9)
    assert spec.iters == (20 if spec.constraint == "identity" else Site.iters)
    assert spec.sinkhorn_eps in (0.0, EPS)


@pytest.mark.parametrize(
    ("near_miss", "reason"),
    [
        (near.LacksAColumnStep, "normalises rows twice"),
        (near.MatrixUsedTwice, "mixing matrix is read elsewhere"),
        (near.IterateUsedTwice, "mixing matrix is read elsewhere"),
        (near.WrongAxis, None),
        (near.OddEps, "eps in places"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_near_misses_are_left_alone(near_miss: type[Site], reason: str | None) -> None:
    found = assert_same(near_miss().double(), _state(), tolerance=0.0)
    assert found.ops == []
    assert found.kinds == []
    assert reason is None or any(reason in text for text in found.reasons)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (near.GateOfAnotherStream, None),
        (near.EpsOutsideTheRoot, "eps is added outside the root"),
        (near.NotNormed, "not of a normed state"),
        (near.MatrixWithoutGradient, None),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_of_another_site_the_sinkhorn_alone_becomes_an_op(
    other: type[Site], reason: str | None
) -> None:
    found = assert_same(other().double(), _state(), tolerance=1e-9)
    assert found.ops == ["sinkhorn"]
    assert found.kinds == ["sinkhorn"]
    assert reason is None or any(reason in text for text in found.reasons)


def test_a_state_whose_places_are_asked_for_is_read_on() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        places = torch.where(x[..., 0, 0])
        return (x.softmax(-2) * x).sum(-2) + len(places)

    assert rewritten(model, _state()).ops == []


def test_a_site_under_no_grad_is_recognised_and_gets_no_gradient() -> None:
    found = assert_same(near.Distilled(DeepSeek()).double(), _state(), tolerance=1e-9)
    assert sorted(found.ops) == ["post", "post", "pre", "pre"]
    assert found.kinds == ["site", "site"]


def test_one_dynamic_graph_is_rewritten_for_all_sizes() -> None:
    model, backend = Site().double(), Rewritten()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for batch, length in ((2, 5), (3, 7)):
        x = torch.randn(batch, length, N, C, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert len(backend.graphs) == 1
    assert backend.ops == ["pre", "post"]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_any_number_of_streams_and_iterations_is_recognised(n: int) -> None:
    model = DeepSeek(n=n)
    model.iters = n
    found = assert_same(model.double(), _state(n), tolerance=1e-9)
    assert SiteSpec.decode(found.chains[0].what).iters == n


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (1, 1)])
def test_any_number_of_batch_axes_is_recognised(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, N, C, dtype=torch.float64)
    assert assert_same(DeepSeek().double(), x, tolerance=1e-9).kinds == ["site"]


class _Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ModuleList(DeepSeek() for _ in range(2))
        self.fn = nn.Parameter(torch.randn(N, N * C) * 0.3)
        self.base, self.scale = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.unsqueeze(2).repeat(1, 1, N, 1)
        for site in self.sites:
            state = site(state)
        flat = state.flatten(2)
        z = flat @ self.fn.T * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        weights = torch.sigmoid(z * self.scale + self.base) + EPS
        return (weights.unsqueeze(-1) * state).sum(2)


def test_a_whole_trunk_with_a_learned_head_becomes_six_ops() -> None:
    x = torch.randn(2, 5, C, dtype=torch.float64)
    found = assert_same(_Trunk().double(), x, tolerance=1e-9)
    assert found.ops == ["expand", "pre", "post", "pre", "post", "collapse"]
    assert found.kinds == ["expand", "site", "site", "collapse"]
    assert all(chain.before > chain.after for chain in found.chains)


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "core ATen"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda kind: kind.__name__)
def test_every_spelling_is_recognised_in_aten_too(spelling: type[Site], decomposed: bool) -> None:
    model, x = spelling(), _state(dtype=torch.float32)
    program = torch.export.export(model, (x,), strict=False)
    if decomposed:
        program = program.run_decompositions()
    module, backend = program.module(check_guards=False), Rewritten()
    assert isinstance(module, torch.fx.GraphModule)
    backend.rewrite(module)
    assert backend.ops == ["pre", "post"]
    torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_exported_graph_is_rewritten_alike() -> None:
    model, x = _Trunk().double(), torch.randn(2, 5, C, dtype=torch.float64)
    module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    backend = Rewritten()
    assert isinstance(module, torch.fx.GraphModule)
    backend.rewrite(module)
    assert backend.ops == ["expand", "pre", "post", "pre", "post", "collapse"]
    torch.testing.assert_close(module(x), model(x), rtol=1e-9, atol=1e-9)


def test_running_the_pass_again_finds_nothing_more() -> None:
    backend = rewritten(Site(), _state(dtype=torch.float32))
    first = list(backend.chains)
    backend.rewrite(backend.graphs[0])
    assert backend.chains == first


def test_new_nodes_say_where_they_come_from() -> None:
    backend = rewritten(Site(), _state(dtype=torch.float32))
    for node in backend.graphs[0].graph.find_nodes(
        op="call_function", target=torch.ops.mhc.post.default
    ):
        assert node.meta["custom"]["mhc"] == "post"
        assert "hyper_spellings.py" in node.meta["stack_trace"]
        assert node.meta["example_value"].shape == (2, 5, N, C)


def _attention(x: torch.Tensor) -> torch.Tensor:
    """Square scores of few tokens, softmax, a residual."""
    return x + (x @ x.mT).softmax(-1) @ x


def _sinkhorn_attention(x: torch.Tensor) -> torch.Tensor:
    scores = x @ x.mT
    for _ in range(3):
        scores = scores.log_softmax(-1).log_softmax(-2)
    return scores.exp() @ x


def _transport(x: torch.Tensor) -> torch.Tensor:
    """Entropic transport between few points, projected back onto them."""
    cost = (x[:, :, None] - x.flip(1)[:, None]).square().sum(-1)
    plan = (-cost).exp()
    for _ in range(3):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return plan @ x + (plan * cost).sum()


def _mixture(x: torch.Tensor) -> torch.Tensor:
    """Experts weighted by gates of the token."""
    experts = torch.stack([torch.tanh(x * k) for k in range(1, 5)], -2)
    return x + (experts * x[..., :4].sigmoid().unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("function", [_attention, _sinkhorn_attention, _transport, _mixture])
def test_nothing_is_recognised_without_hyper_connections(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    backend = rewritten(function, torch.randn(2, N, 8))
    assert backend.ops == []
    assert backend.chains == []


class Keywords(nn.Module):
    """Operands by name, as some attention code passes them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.matmul(input=x, other=x.mT).softmax(-1)
        bias = torch.zeros(x.shape[0], 1, 1, dtype=x.dtype)
        scores = bias.baddbmm(batch1=weights, batch2=x, beta=1.0, alpha=0.5)
        mixed = torch.bmm(weights, mat2=scores) + torch.mul(x, other=x).sum(dim=1, keepdim=True)
        return nn.functional.linear(input=mixed, weight=torch.eye(x.shape[-1], dtype=x.dtype))


def test_operands_may_be_spelt_by_name() -> None:
    found = assert_same(Keywords(), torch.randn(4, 4, C, dtype=torch.float64), tolerance=0.0)
    assert found.ops == []
