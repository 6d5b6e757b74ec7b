"""Sites that a backward makes again: which are replayed from what was kept, and with which bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import mhc_compile
from mhc_compile.inspection import lowered_graphs
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.replay import keep_mappings_pass, replay_sites_pass
from tests.nets import Net, converted, example, run

OPS = torch.ops.mhc
SPEC = SiteSpec(streams=2, iters=3).encode()
STATIC = SiteSpec(streams=2, dynamic=False).encode()


def arguments(sites: int) -> list[Tensor]:
    """A state and a gradient of one, then a branch output, phi, bias and alpha of every site."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    made = [normal(5, 2, 4), normal(5, 2, 4)]
    for _ in range(sites):
        made += [normal(5, 4), normal(8, 8), normal(8), torch.ones(3)]
    return made


Branch = Callable[[Tensor, Tensor], Tensor]


def backward(
    *given: Tensor, branch: Branch = lambda f, u: f, spec: str = SPEC, reads_mapping: bool = False
) -> Iterator[Tensor]:
    """A backward that makes a block of sites again, whose mappings it is given.

    Args:
        given: `arguments`, then h_post, h_res and saved of every site.
        branch: makes the branch output of a site from what was kept and the branch input.
        spec: of all sites.
        reads_mapping: have something read a mapping of the last site that is made again.
    """
    count = (len(given) - 2) // 7
    state, grad = given[:2]
    sites = [given[2 + 4 * i : 6 + 4 * i] for i in range(count)]
    kept = [given[2 + 4 * count + 3 * i :][:3] for i in range(count)]
    states, outputs = [state], []
    result = OPS.pre(state, *sites[0][1:], spec)
    u = result[0]
    yield u.sin()
    for (f, *_), (_, *own), (h_post, h_res, _) in zip(sites, sites[1:], kept, strict=False):
        outputs.append(branch(f, u))
        result = OPS.seam(states[-1], outputs[-1], h_post, h_res, *own, spec)
        states.append(result[0])
        u = result[1]
        yield u.cos()
    if reads_mapping:
        yield result[-1].sin()
    for i in reversed(range(1, count)):
        grads = (grad, states[i][..., 0, :], kept[i][0], kept[i][1])
        before = (states[i - 1], outputs[i - 1], *kept[i - 1][:2])
        results = OPS.seam_backward(*grads, *before, *sites[i][1:], kept[i][2], spec)
        grad = results[0]
        yield from results[1:]
    yield from OPS.pre_backward(
        states[0][..., 1, :], *kept[0][:2], state, *sites[0][1:], kept[0][2], spec, grad
    )


def given_to(sites: int, spec: str = SPEC) -> list[Tensor]:
    """Of `backward`."""
    made = arguments(sites)
    dynamic = SiteSpec.decode(spec).dynamic
    state, kept = made[0], []
    for i in range(sites):
        f, phi, bias, alpha = made[2 + 4 * i : 6 + 4 * i]
        own = (phi, bias, alpha) if dynamic else (None, bias, None)
        _, *mappings = OPS.pre(state, *own, spec)
        kept += mappings
        state = OPS.post(state, f, *mappings[:2], spec)
    return made + kept


def lowered(given: list[Tensor], mode: str = "fake", **options: Any) -> GraphModule:
    return make_fx(lambda *args: list(backward(*args, **options)), tracing_mode=mode)(*given)


def replayed(gm: GraphModule) -> bool:
    modified = replay_sites_pass(gm, ()).modified
    gm.graph.lint()
    gm.recompile()
    return modified


def count(gm: GraphModule, name: str) -> int:
    return [op_name(node) for node in gm.graph.nodes].count(f"mhc.{name}")


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("sites", [1, 4])
def test_a_block_of_sites_becomes_one_op_with_the_same_bits(sites: int, mode: str) -> None:
    given = given_to(sites)
    gm = lowered(given, mode)
    expected = gm(*given)
    assert replayed(gm)
    assert (count(gm, "replay"), count(gm, "pre"), count(gm, "seam")) == (1, 0, 0)
    assert_same_bits(gm(*given), expected)


def test_a_second_run_changes_nothing() -> None:
    gm = lowered(given_to(3))
    assert replayed(gm)
    assert not replayed(gm)


def test_a_branch_that_is_made_of_a_replayed_state_starts_another_replay() -> None:
    given = given_to(4)
    branches = iter([False, True, False] * 2)
    gm = lowered(given, branch=lambda f, u: f + 0 * u if next(branches) else f)
    expected = gm(*given)
    assert replayed(gm)
    assert (count(gm, "replay"), count(gm, "seam")) == (2, 0)
    assert_same_bits(gm(*given), expected)


def test_branches_that_are_made_of_kept_values_are_replayed_behind_them() -> None:
    given = given_to(3)
    gm = lowered(given, branch=lambda f, u: f.neg().neg())
    expected = gm(*given)
    assert replayed(gm)
    assert (count(gm, "replay"), count(gm, "seam")) == (1, 0)
    assert_same_bits(gm(*given), expected)


def test_a_site_whose_mappings_are_read_is_left_alone() -> None:
    given = given_to(3)
    gm = lowered(given, reads_mapping=True)
    expected = gm(*given)
    assert replayed(gm)
    assert (count(gm, "replay"), count(gm, "seam")) == (1, 1)
    assert_same_bits(gm(*given), expected)


def test_two_trunks_that_are_made_of_each_other_are_not_joined_into_a_circle() -> None:
    # The second state of each needs the first branch input of the other.
    given = given_to(2)

    def both(*args: Tensor) -> list[Tensor]:
        state, f, phi, bias, alpha = args[0], *args[2:6]
        h_post, h_res, saved = args[10:13]
        reads = [OPS.pre(one, phi, bias, alpha, SPEC)[0] for one in (state, state.neg().neg())]
        made = []
        for other in reversed(reads):
            of = (state, f + 0 * other, h_post, h_res, *args[7:10])
            made += OPS.seam(*of, SPEC)[:2]
            grads = (state, f, h_post, h_res)
            made += OPS.seam_backward(*grads, *of, args[15], SPEC)
        grads = OPS.pre_backward(f, h_post, h_res, state, phi, bias, alpha, saved, SPEC)
        return [*reads, *made, *grads]

    gm = make_fx(both, tracing_mode="fake")(*given)
    expected = gm(*given)
    assert replayed(gm)
    assert_same_bits(gm(*given), expected)


def test_a_graph_without_sites_is_left_alone() -> None:
    gm = make_fx(lambda x: x.sin(), tracing_mode="fake")(torch.randn(3))
    assert not replayed(gm)
    assert not keep_mappings_pass(gm, ()).modified


class Forward:
    """What AOTAutograd makes of a converted net, with both passes."""

    def __init__(self, model: nn.Module, *, skip: tuple[str, ...] = (), **options: Any) -> None:
        config = mhc_compile.MHCConfig(inner="aot_eager", skip_passes=skip, **options)
        graphs = lowered_graphs(model, example(), config=config)[1]
        self.of = {graph.phase: graph.gm for graph in graphs}

    def count(self, phase: str, name: str) -> int:
        return count(self.of[phase], name)


def test_a_model_keeps_its_mappings_and_projects_nothing_twice() -> None:
    found = Forward(Net(4), recompute=4)
    assert found.count("bw", "replay") == 2
    assert found.count("bw", "pre") + found.count("bw", "seam") == 0
    assert found.count("fw", "keep") == 0
    names = [node.name for node in found.of["bw"].graph.find_nodes(op="placeholder")]
    assert sum(name.endswith("_kept") for name in names) == 8 * 3


def test_without_recomputation_there_is_nothing_to_replay() -> None:
    found = Forward(Net(2), recompute="off")
    assert found.count("bw", "replay") == 0
    assert found.count("bw", "seam") == 0


def test_static_sites_are_made_again_as_before() -> None:
    found = Forward(Net(2), recompute=2, dynamic=False)
    assert found.count("bw", "replay") == 0
    assert found.count("bw", "seam") > 0


@pytest.mark.parametrize("skip", [("keep_mappings_pass",), ("replay_sites_pass",)])
def test_either_pass_can_be_switched_off(skip: tuple[str, ...]) -> None:
    x, results = example(), []
    model = converted(Net(3), x)
    for skipped in ((), skip):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "recompute": 3, "skip_passes": skipped}
        results.append(run(torch.compile(model, backend="mhc", options=options), model, x))
    (output, gradients), (other, others) = results
    assert torch.equal(output, other)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


class Checkpointed(Net):
    """The user recomputes every block."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_regions_of_the_user_keep_nothing_more() -> None:
    found = Forward(Checkpointed(2), recompute="auto")
    assert found.count("bw", "replay") == 0
    names = [node.name for node in found.of["bw"].graph.find_nodes(op="placeholder")]
    assert not any(name.endswith("_kept") for name in names)


def test_only_what_is_tagged_is_marked() -> None:
    def two(X: Tensor, f: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        for _ in range(2):
            _, h_post, h_res, _ = OPS.pre(X, phi, bias, alpha, SPEC)
            X = OPS.post(X, f, h_post, h_res, SPEC)
        return X

    given = (arguments(1)[0], *arguments(1)[2:])
    gm = make_fx(two, tracing_mode="fake")(*given)
    expected = gm(*given)
    first, _ = gm.graph.find_nodes(op="call_function", target=OPS.pre.default)
    first.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    assert keep_mappings_pass(gm, ()).modified
    gm.graph.lint()
    gm.recompile()
    (kept,) = gm.graph.find_nodes(op="call_function", target=OPS.keep.default)
    assert kept.meta["recompute"] == CheckpointPolicy.MUST_SAVE
    assert {node.args[0] for node in kept.args[0]} == {first}  # type: ignore[union-attr]
    assert torch.equal(gm(*given), expected)
    assert replayed(gm)  # which takes the copies out again
    assert count(gm, "keep") == 0
    assert torch.equal(gm(*given), expected)
