"""A site inside the branch of another gets an origin of its own."""

import torch
from torch import nn

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.origins import part_origins
from mhc_compile.passes.residuals import find_residuals
from tests.passes.programs import Branch
from tests.passes.rewriting import assert_same, traced, widen

X = torch.randn(2, 3, 8)


class Around(nn.Module):
    """A residual around a trunk of two sites, ``depth`` times one inside the other."""

    def __init__(self, depth: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.depth, self.scale = depth, scale
        self.f, self.g, self.h = Branch(), Branch(), Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scale * x + self.f(x)
        y = y + self.g(y)
        for _ in range(self.depth):
            y = x + self.h(y)
        return y


def parted(t):
    found, rounds = find_residuals(t.gm.graph), 0
    while part_origins(t.gm.graph, found):
        found, rounds = find_residuals(t.gm.graph), rounds + 1
    t.gm.graph.lint()
    t.gm.recompile()
    return found, rounds


def aliases(t):
    return [node for node in t.gm.graph.nodes if op_name(node) == "alias"]


def test_the_inner_site_starts_from_an_alias_and_the_outer_one_from_the_value():
    t = traced(Around(), X)
    outputs = t.run()
    found, rounds = parted(t)
    (alias,) = aliases(t)
    first, second, outer = found.sites
    assert rounds == 1
    assert (first.origin, second.origin) == (alias, first.root)
    assert outer.origin is alias.args[0]
    assert set(alias.args[0].users) == {alias, outer.root}
    assert alias.meta["example_value"].shape == X.shape
    assert_same(t.run(), outputs, 0)


def test_all_three_are_widened_and_the_function_is_kept():
    for scale in (1.0, 0.5):
        t = traced(Around(scale=scale), X)
        outputs, gradients = t.run(), t.gradients()
        plan = widen(t)
        assert [len(trunk) for trunk in plan.trunks] == [2, 1]
        assert plan.left == {}
        assert_same(t.run(), outputs)
        assert_same(t.gradients()[: len(gradients)], gradients, 1e-5)


def test_deeper_nesting_takes_one_round_a_level():
    t = traced(Around(depth=2), X)
    outputs = t.run()
    found, rounds = parted(t)
    assert rounds == len(aliases(t)) == 2
    assert len({site.origin for site in found.sites}) == len(found.sites) == 4
    assert_same(t.run(), outputs, 0)


def test_two_sites_side_by_side_keep_their_common_origin():
    class Fork(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.f(x)) * torch.sigmoid(x + self.g(x))

    t = traced(Fork(), X)
    before = [node.name for node in t.gm.graph.nodes]
    assert parted(t)[1] == 0
    assert [node.name for node in t.gm.graph.nodes] == before
