"""``single_pass``: sites read by the weights of the site before, from conversion to training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ConfigError, MHCConfig, UnsupportedGraphError
from mhc_compile.distributed import split_stages
from mhc_compile.kernels.reference import post_ref, pre_ref, read_ref
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.match import sites_of
from mhc_compile.passes.opnames import op_name
from tests.nets import (
    WIDTH,
    Block,
    Net,
    PostNormBlock,
    assert_same,
    compile_blocks_,
    compiled,
    converted,
    distance,
    example,
    perturb_,
    run,
)

QUICK: dict[str, Any] = {"single_pass": True, "kernels": "reference"}
Tensors = tuple[torch.Tensor, ...]


class Hidden(Net):
    """Returns the trunk behind each block, as ``output_hidden_states`` does."""

    def forward(self, x: torch.Tensor) -> Tensors:  # type: ignore[override]
        x = self.stem(x)
        hidden = [x]
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        return (self.head(x), *hidden)


class Turned(Net):
    """Swaps two axes of tokens in the middle of its trunk."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.stem(x))
        return self.head(self.blocks[1](x.transpose(0, 1)))


class Normed(Net):
    """Norms its trunk between two blocks, operation by operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.stem(x))
        x = 1.5 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(self.blocks[1](x))


class Projecting(nn.Module):
    """A trunk that is projected to another width, as those of ResNets are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Block(), Block(2 * WIDTH)
        self.skip, self.branch = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.skip(x) + torch.tanh(self.branch(x)))


def trunks(report: mhc_compile.Report) -> list[int]:
    """Sites of each trunk."""
    return [len(trunk.sites) for trunk in report.trunks]


def by_hand(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    """The trunk of a converted ``Net`` at its start and behind every site, by the equations."""
    x = net.stem(x)
    seen, gates = [x], None
    X = x[..., None, :].expand(*x.shape[:-1], 4, WIDTH)
    for block in net.blocks:
        sites = sites_of(block)
        assert sites is not None
        branches = (
            lambda u, b=block: torch.tanh(b.linear(b.norm(u))),
            lambda u, b=block: torch.relu(b.linear2(b.norm2(u))),
        )
        for key, branch in zip(("add0", "add1"), branches, strict=True):
            site = sites.site(key)
            own = dict(site.named_parameters())
            parameters = (own.get("phi"), own["bias"], own.get("alpha"))
            u, gates, h_res = pre_ref(X, *parameters, site.spec, gates)
            X = post_ref(X, branch(u), gates, h_res, site.spec)
            seen.append(read_ref(X, gates, site.spec))
    return seen


# ------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("constraint", ["sinkhorn", "sinkhorn_softmax", "identity", "kronecker"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_conversion_preserves_outputs_and_gradients(constraint: str, dynamic: bool) -> None:
    model, x = Net(2), example()
    expected = run(model, model, x)
    # The usual eps of the softmax form is larger than what rounding does.
    own = {"constraint": constraint, "dynamic": dynamic, "sinkhorn_eps": 0.0}
    converted(model, x, perturbed=False, **own, **QUICK)
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_different_streams_follow_the_equations(dynamic: bool) -> None:
    x = example()
    model = converted(Hidden(2), x, dynamic=dynamic, **QUICK)
    step = compiled(model)
    found = run(lambda x: torch.stack(step(x)[1:]), model, x)
    assert_same(found, run(lambda x: torch.stack(by_hand(model, x)[::2]), model, x))


def test_generated_cpp_computes_the_same_network() -> None:
    x = example(3, 7)
    model = converted(Net(2), x, single_pass=True)
    found = run(compiled(model, inner="aot_eager"), model, x)
    expected = run(lambda x: model.head(by_hand(model, x)[-1]), model, x)
    assert_same(found, expected, output=1e-5, grad=1e-5)


def test_streams_separate_in_training_and_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    x = example(4, 5)
    model = converted(Net(3), x, perturbed=False, **QUICK)
    step = compiled(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = step(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in mhc_compile.mhc_parameters(model):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6, name
    report = mhc_compile.stability(model, x)
    assert max(site.spread for site in report.sites) > 1e-3


@pytest.mark.parametrize("recompute", ["auto", 1, 2, "off"])
def test_recomputed_blocks_give_the_same_bits(recompute: Any) -> None:
    x = example()
    model = converted(Net(3), x, **QUICK)
    expected = run(compiled(model, recompute="off", skip_passes=("join_seams_pass",)), model, x)
    found = run(compiled(model, "aot_eager", recompute=recompute), model, x)
    assert_same(found, expected, output=0.0, grad=1e-6)


# -------------------------------------------------------------------------------- the graph


def operations(model: nn.Module, x: torch.Tensor) -> list[str]:
    nodes = mhc_compile.rewrite(model, x).graph.nodes
    return [op_name(node) for node in nodes if op_name(node).startswith("mhc.")]


def test_a_trunk_is_seams_between_one_pre_and_one_post() -> None:
    x = example()
    model = converted(Net(2), x, **QUICK)
    seams = ["mhc.seam"] * 3
    assert operations(model, x) == ["mhc.expand", "mhc.pre", *seams, "mhc.post", "mhc.read"]


def test_readers_in_the_middle_get_what_the_next_branch_reads() -> None:
    x = example()
    model = converted(Hidden(2), x, **QUICK)
    assert operations(model, x).count("mhc.read") == 1  # of the last state


def test_a_trunk_ends_where_its_tokens_move() -> None:
    model, x = Turned(2), example()
    two_pass = mhc_compile.explain(model, x)
    report = mhc_compile.explain(model, x, config=MHCConfig(single_pass=True))
    assert (trunks(two_pass), trunks(report)) == ([4], [2, 2])
    expected = run(model, model, x)
    converted(model, x, perturbed=False, **QUICK)
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (Projecting, [2, 3]),
        (lambda: Normed(2), [4]),
        (lambda: Net([PostNormBlock() for _ in range(3)]), [3]),
        (lambda: nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH), Block()), [2, 2]),
        (lambda: Net([block := Block(), block, Block()]), [6]),
    ],
)
def test_other_trunks_are_preserved(build: Callable[[], nn.Module], sizes: list[int]) -> None:
    model, x = build(), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x, config=MHCConfig(**QUICK))
    assert trunks(report) == sizes
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)
    perturb_(model)
    whole = run(compiled(model), model, x)
    assert_same(run(mhc_compile.rewrite(model, x), model, x), whole)
    assert distance(whole[0], expected[0]) > 1e-3


# ---------------------------------------------------------------------- from graph to graph


@pytest.mark.parametrize("dynamic", [True, False])
def test_weights_cross_from_block_to_block(dynamic: bool) -> None:
    x = example()
    model = converted(Net(3), x, dynamic=dynamic, **QUICK)
    expected = run(compiled(model), model, x)
    compile_blocks_(model.blocks, "aot_eager")
    assert_same(run(model, model, x), expected)
    with torch.no_grad():
        assert distance(model(x), expected[0]) <= 1e-6


def test_weights_cross_a_graph_break_and_other_shapes() -> None:
    class Breaking(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.stem(x))
            torch._dynamo.graph_break()
            return self.head(self.blocks[1](x))

    x = example()
    model = converted(Breaking(2), x, **QUICK)
    step = torch.compile(model, backend="mhc", dynamic=True, options={"inner": "aot_eager"})
    for shape in ((2, 5), (3, 4), (6, 7)):
        x = example(*shape)
        found = run(step, model, x)
        assert_same(found, run(lambda x: model.head(by_hand(model, x)[-1]), model, x))


def test_lost_weights_are_refused_with_the_streams() -> None:
    x = example()
    model = converted(Net([Block(), nn.Identity(), Block()]), x, **QUICK)
    compile_blocks_(model.blocks)
    model.blocks[1].forward = lambda x: x + 0.0
    with pytest.raises(UnsupportedGraphError, match="streams were lost before add0"):
        model(x)


def test_saved_parameters_load_into_another_model() -> None:
    x = example()
    model, other = (converted(Net(2), x, **QUICK) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert_same(run(compiled(other), other, x), run(compiled(model), model, x))


def test_a_pipeline_is_refused_for_the_weights_that_would_have_to_travel() -> None:
    x = example()
    model = converted(Net(3), x, **QUICK)
    with pytest.raises(UnsupportedGraphError, match=r"cannot be cut into 2 stages.*also alive"):
        split_stages(model, x, stages=2)


# ----------------------------------------------------------------------------- configuration


def test_a_single_pass_ends_with_its_own_weights() -> None:
    assert MHCConfig().collapse == "mean"
    assert MHCConfig(single_pass=True).collapse == "pre"
    for collapse in ("mean", "sum", "learned"):
        with pytest.raises(ConfigError, match=r"not allowed with single_pass=True.*'pre'"):
            MHCConfig(single_pass=True, collapse=collapse, init="paper")
    with pytest.raises(ConfigError, match="not allowed with single_pass=False"):
        MHCConfig(collapse="pre")


def test_a_constraint_without_a_sigmoid_is_refused() -> None:
    with pytest.raises(ConfigError, match="single_pass=True is not defined for constraint='none'"):
        MHCConfig(single_pass=True, constraint="none")


def test_compilation_follows_the_conversion() -> None:
    x = example()
    model = converted(Net(2), x, **QUICK)
    with pytest.raises(ConfigError, match="single_pass=False contradicts the conversion"):
        compiled(model, single_pass=False)(x)
    assert replace(MHCConfig(single_pass=True).spec(), single_pass=False) == SiteSpec(streams=4)
