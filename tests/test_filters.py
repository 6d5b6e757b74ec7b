"""Which sites a conversion takes: patterns of names, of forms and traits, and functions."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ConfigError, MHCConfig
from tests.nets import (
    Net,
    compiled,
    distance,
    example,
    perturb_,
)


def test_include_and_exclude_choose_sites_by_name() -> None:
    model, x = Net(3), example()
    config = MHCConfig(include=("blocks.*",), exclude=("blocks.1.*", "*.add1"))
    report = mhc_compile.convert_(model, x, config=config)
    assert [site.name for site in report.converted] == ["blocks.0.add0", "blocks.2.add0"]
    assert {site.reason for site in report.left} == {
        "excluded by 'blocks.1.*'",
        "excluded by '*.add1'",
    }
    expected = copy.deepcopy(model)
    mhc_compile.revert_(expected)
    assert distance(compiled(model)(x), expected(x)) <= 2e-6
    perturb_(model)
    assert distance(compiled(model)(x), expected(x)) > 1e-3


def test_a_pattern_that_matches_no_site_is_noted() -> None:
    config = MHCConfig(include=("blocks.*", "block.2*"), exclude=("form:scaled skip",))
    report = mhc_compile.explain(Net(3), example(), config=config)
    assert [note.split(" matches none")[0] for note in report.notes] == [
        "include: 'block.2*'",
        "exclude: 'form:scaled skip'",
    ]
    assert not mhc_compile.explain(Net(3), example()).notes


def test_patterns_of_forms_and_traits_choose_sites_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.project = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 0.5 * torch.tanh(self.f(x))
            return self.project(x) + torch.tanh(self.g(x))

    x = torch.randn(2, 3, 8)

    def chosen(**filters: Any) -> list[str]:
        report = mhc_compile.explain(Two(), x, config=MHCConfig(**filters))
        return [site.form for site in report.converted]

    assert chosen() == ["identity", "projection"]
    assert chosen(exclude=("form:projection",)) == ["identity"]
    assert chosen(include=("form:proj*",)) == ["projection"]
    assert chosen(include=("form:scaled branch",)) == ["identity"]
    assert chosen(include=("add1", "form:identity"), exclude=("*0",)) == ["projection"]


def test_a_predicate_chooses_sites_and_the_model_keeps_the_names_it_took() -> None:
    model, x = Net(3), example()
    config = MHCConfig(include=lambda site: site.key == "add0", exclude=lambda s: "1" in s.owner)
    names = ["blocks.0.add0", "blocks.2.add0"]
    assert [site.name for site in mhc_compile.explain(model, x, config=config).converted] == names
    report = mhc_compile.convert_(model, x, config=config)
    assert [site.name for site in report.converted] == names
    assert report.config["include"] == ("blocks.0.add0", "blocks.1.add0", "blocks.2.add0")
    assert json.loads(report.to_json())["config"]["exclude"] == ["blocks.1.add0", "blocks.1.add1"]
    expected = copy.deepcopy(model)
    mhc_compile.revert_(expected)
    assert distance(compiled(copy.deepcopy(model))(x), expected(x)) <= 2e-6
    assert mhc_compile.convert_(model, x, config=config).config == report.config
    rewritten = mhc_compile.rewrite(expected, x, config=config)
    assert sum("bias" in name and ".mhc." in name for name, _ in rewritten.named_parameters()) == 2


def test_the_last_layers_alone_can_be_converted() -> None:
    model, x = Net(4), example()
    (trunk,) = mhc_compile.explain(model, x).trunks
    report = mhc_compile.convert_(model, x, config=MHCConfig(include=trunk.sites[-4:]))
    assert [site.owner for site in report.converted] == ["blocks.2"] * 2 + ["blocks.3"] * 2
    expected = copy.deepcopy(model)
    mhc_compile.revert_(expected)
    assert distance(compiled(model)(x), expected(x)) <= 2e-6


def test_a_predicate_is_no_option_of_the_backend() -> None:
    with pytest.raises(ConfigError, match=r"give the function to mhc_compile\.convert_"):
        MHCConfig.from_options({"include": lambda site: True})
