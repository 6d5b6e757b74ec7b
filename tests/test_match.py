"""A captured graph against the record of conversion: same site, same parameters, or a refusal."""

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import UnsupportedGraphError
from mhc_compile.match import sites_of
from tests.nets import (
    WIDTH,
    Block,
    Net,
    assert_same,
    compiled,
    converted,
    distance,
    example,
    run,
)


class Branching(nn.Module):
    """Which adds happen, and where, is chosen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.way = "both"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "second only":
            return torch.relu(x) + torch.tanh(self.second(torch.relu(x)))
        x = x + torch.tanh(self.first(x))
        if self.way == "other lines":
            return x + torch.tanh(self.second(x)) * 1.0
        if self.way == "one between":
            x = x + torch.sigmoid(self.second(x))
        if self.way != "first only":
            x = x + torch.tanh(self.second(x))
        if self.way == "one behind":
            x = x + torch.sigmoid(self.second(x))
        return x


def branching(way: str) -> Net:
    model = converted(Net([Branching()]), example())
    model.blocks[0].way = way
    return model


def test_what_was_recorded_names_key_line_and_place_in_the_trunk() -> None:
    model = converted(Net(3), example())
    records = [sites_of(block).records for block in model.blocks]
    assert [[record.key for record in owner] for owner in records] == [["add0", "add1"]] * 3
    assert all(record.source.startswith("nets.py:") for owner in records for record in owner)
    flat = [record for owner in records for record in owner]
    assert [record.starts for record in flat] == [True] + 5 * [False]
    assert [record.follows for record in flat] == [False] + 5 * [True]
    assert [record.continues for record in flat] == 5 * [True] + [False]
    assert [record.ends for record in flat] == 5 * [False] + [True]


def test_a_shared_block_is_recorded_with_all_its_places() -> None:
    first, second = Block(), Block()
    converted(Net([first, second, first]), example())
    start, end = sites_of(first).records
    assert (start.starts, start.follows, start.continues, start.ends) == (True, True, True, False)
    assert (end.starts, end.follows, end.continues, end.ends) == (False, True, True, True)


def test_the_same_number_of_adds_on_other_lines_are_the_same_sites() -> None:
    x = example()
    model = branching("both")
    expected = compiled(model)(x)
    model.blocks[0].way = "other lines"
    assert distance(compiled(model)(x), expected) <= 1e-6


@pytest.mark.parametrize("way", ["first only", "second only"])
def test_a_call_with_fewer_adds_than_recorded_is_refused_by_name(way: str) -> None:
    with pytest.raises(UnsupportedGraphError) as caught:
        compiled(branching(way))(example())
    text = str(caught.value)
    assert "does not hold a whole call of the converted Branching" in text
    assert "add1 (test_match.py:" in text


def test_an_add_that_conversion_did_not_see_stays_plain() -> None:
    x = example()
    model = Net([Branching()])
    model.blocks[0].way = "one behind"
    expected = run(model, model, x)
    model.blocks[0].way = "both"
    converted(model, x, perturbed=False)
    model.blocks[0].way = "one behind"
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_an_add_that_conversion_did_not_see_may_not_cut_a_trunk() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"add1 \(test_match.py:\d+\) continues"):
        compiled(branching("one between"))(example())


def test_train_and_eval_use_the_same_sites_although_dropout_comes_and_goes() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return x + torch.tanh(self.linear(x))
            return x + self.dropout(torch.tanh(self.linear(x)))

    x = example()
    model = Net([Drops(), Drops()]).eval()
    expected = model(x)
    assert len(mhc_compile.convert_(model, x).converted) == 2
    step = compiled(model)
    assert distance(step(x), expected) <= 2e-6
    model.train()
    step(x).sum().backward()
    assert all(parameter.grad is not None for _, parameter in mhc_compile.mhc_parameters(model))


def test_a_plain_module_beside_a_converted_one_is_left_alone() -> None:
    x = example()
    model = converted(Net(2), x, exclude=("blocks.0.*",))
    assert sites_of(model.blocks[0]) is None or not len(sites_of(model.blocks[0]))
    assert sites_of(model.blocks[1]) is not None
    output = compiled(model)(x)
    assert distance(output, mhc_compile.rewrite(model, x)(x)) <= 1e-6
