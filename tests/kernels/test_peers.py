"""The ops against other people's modules, with every weight mapping written out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
HC_EPS, NORM_EPS = 1e-3, 1e-5  # different, and large enough for a mix-up to show


def _relative(mine: torch.Tensor, right: torch.Tensor) -> float:
    return ((mine - right).norm() / right.norm()).item()


def _deepseek(kind: str, n: int, channels: int) -> torch.nn.Module:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = SimpleNamespace(
        hc_mult=n,
        hc_sinkhorn_iters=20,
        hc_eps=HC_EPS,
        rms_norm_eps=NORM_EPS,
        hidden_size=channels,
    )
    module: torch.nn.Module = getattr(modeling, kind)(config)
    torch.manual_seed(0)
    for parameter in module.parameters():  # they come uninitialised
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 2 else 1.0)
    return module


def _from_deepseek(ref: Any, n: int, transpose: bool = True) -> list[torch.Tensor]:
    """Our phi, bias and alpha from ``fn`` [(2 + n) n, n C], ``base`` and ``scale``.

    ``fn`` is the transpose of phi, in the same order [pre | post | comb]. Their ``comb`` logits are
    [in, out] and ours [out, in], so that block is transposed in the projection and in the bias.
    """

    def swapped(rows: torch.Tensor) -> torch.Tensor:
        comb = rows[2 * n :].reshape(n, n, *rows.shape[1:])
        return torch.cat(
            (rows[: 2 * n], (comb.transpose(0, 1) if transpose else comb).flatten(0, 1))
        )

    return [swapped(ref.fn).mT, swapped(ref.base), ref.scale]


def _deepseek_spec(n: int) -> str:
    return SiteSpec(
        streams=n,
        constraint="sinkhorn_softmax",
        sinkhorn_eps=HC_EPS,
        pre_eps=HC_EPS,
        norm_eps=NORM_EPS,
    ).encode()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_site_equals_deepseek_v4s_outputs_and_gradients(n: int) -> None:
    channels = 40
    ref = _deepseek("DeepseekV4HyperConnection", n, channels)
    x = torch.randn(2, 7, n, channels, requires_grad=True)
    inputs = (x, *ref.parameters())

    post, comb, u = ref(x)
    streams = post[..., None] * torch.tanh(u)[..., None, :] + comb.mT @ x
    mine_u, h_post, h_res, _ = OPS.pre(x, *_from_deepseek(ref, n), _deepseek_spec(n))
    mine = OPS.post(x, torch.tanh(mine_u), h_post, h_res, _deepseek_spec(n))

    assert _relative(mine_u, u) < 2e-6
    assert _relative(h_post, post) < 2e-6
    assert _relative(h_res, comb.mT) < 2e-6
    assert _relative(mine, streams) < 2e-6
    weight = torch.randn_like(streams)
    right_gradients = torch.autograd.grad((streams * weight).sum(), inputs)
    my_gradients = torch.autograd.grad((mine * weight).sum(), inputs)
    for my_gradient, right in zip(my_gradients, right_gradients, strict=True):
        assert _relative(my_gradient, right) < 5e-6


def test_forgetting_to_transpose_deepseeks_mixing_is_far_off() -> None:
    ref = _deepseek("DeepseekV4HyperConnection", 4, 40)
    x = torch.randn(2, 7, 4, 40)
    _, comb, _ = ref(x)
    h_res = OPS.pre(x, *_from_deepseek(ref, 4, transpose=False), _deepseek_spec(4))[2]
    assert _relative(h_res, comb.mT) > 0.1
    assert _relative(h_res, comb) > 1e-6  # nor is it their matrix: the other sums are exact


def test_the_learned_collapse_equals_deepseek_v4s_head() -> None:
    ref: Any = _deepseek("DeepseekV4HyperHead", 4, 40)
    x = torch.randn(2, 7, 4, 40, requires_grad=True)
    inputs = (x, *ref.parameters())
    right = ref(x)
    head = (ref.hc_fn.mT, ref.hc_base, ref.hc_scale)
    mine = OPS.collapse(x, *head, "learned", _deepseek_spec(4))
    assert _relative(mine, right) < 2e-6
    right_gradients = torch.autograd.grad(right.square().sum(), inputs)
    my_gradients = torch.autograd.grad(mine.square().sum(), inputs)
    for my_gradient, right_gradient in zip(my_gradients, right_gradients, strict=True):
        assert _relative(my_gradient, right_gradient) < 5e-6


def _lucidrains(n: int, channels: int, index: int) -> Any:
    library = pytest.importorskip("hyper_connections")
    return library.HyperConnections(n, dim=channels, layer_index=index)


def _from_lucidrains(ref: Any, n: int) -> list[torch.Tensor]:
    """Our phi, bias and alpha from a ``HyperConnections`` module.

    Columns 0 and 1.. of ``dynamic_alpha_fn`` are pre and the mixing into each output;
    ``static_alpha`` [in, 1 + out] is transposed into [out, in]. Pre and mixing share a scale. The
    norm's gain multiplies the rows of phi.
    """
    gain = (ref.norm.gamma + 1)[:, None]
    pre, res = ref.dynamic_alpha_fn[:, :1], ref.dynamic_alpha_fn[:, 1:]
    phi = gain * torch.cat((pre, ref.dynamic_beta_fn[:, None], res), 1)
    static = ref.static_alpha
    bias = torch.cat((static[:, 0], ref.static_beta, static[:, 1:].mT.flatten()))
    shared, post = ref.dynamic_alpha_scale, ref.dynamic_beta_scale
    return [phi, bias, torch.stack((shared, post, shared))]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n", [2, 4, 5])
def test_unconstrained_equals_lucidrains_hyper_connections(n: int, trained: bool) -> None:
    channels = 24
    torch.manual_seed(0)
    sites = [_lucidrains(n, channels, index) for index in range(3)]
    parameters: list[torch.Tensor] = [p for site in sites for p in site.parameters()]
    if trained:
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, channels, requires_grad=True)
    text = SiteSpec(streams=n, constraint="none", norm_eps=1e-20).encode()

    folded = x.repeat_interleave(n, 0)  # their streams ride on the batch: (b s) t d
    state = OPS.expand(x, n, -1)
    for site in sites:
        u, add = site(folded)
        folded = add(torch.tanh(u))
        mine, h_post, h_res, _ = OPS.pre(state, *_from_lucidrains(site, n), text)
        state = OPS.post(state, torch.tanh(mine), h_post, h_res, text)
    right = folded.unflatten(0, (-1, n)).sum(1)
    out = OPS.collapse(state, None, None, None, "sum", text)

    assert _relative(out, right) < 2e-6
    inputs = (x, *parameters)
    right_gradients = torch.autograd.grad(right.square().sum(), inputs)
    my_gradients = torch.autograd.grad(out.square().sum(), inputs)
    for my_gradient, right_gradient in zip(my_gradients, right_gradients, strict=True):
        torch.testing.assert_close(
            my_gradient,
            right_gradient,
            rtol=0,
            atol=1e-5 * right_gradient.abs().max().item() + 1e-6,
        )
