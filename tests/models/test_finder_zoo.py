"""The finder on real architectures: every site and no other, in the right trunks."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from mhc_compile.passes.residuals import Residuals, find_residuals
from mhc_compile.passes.slices import merge_equal_slices
from tests.models.zoo import BUILDERS, build
from tests.passes.graphs import captures

TRUTH = json.loads((Path(__file__).parent / "truth.json").read_text())
FAST = {"gpt2", "gpt_neox", "bert", "t5", "wav2vec2", "resnet18"}


def models(names: Iterator[str]) -> list[object]:
    """The names as test parameters, each for any process; all but a few are slow."""
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(f"graphs of {name}"),
                *([] if name in FAST else [pytest.mark.slow]),
            ],
        )
        for name in names
    ]


def check(name: str, found: list[Residuals], *, whole: bool = False) -> None:
    """Hold what was found against the truth; ``whole`` graphs are not cut by graph breaks."""
    truth = TRUTH[name]
    trunks = [len(trunk) for part in found for trunk in part.trunks]
    # A graph break cuts sites; a graph that several layers share shows its sites once.
    keys = () if whole else ("cut", "shared")
    hidden = sum(truth.get(key, 0) for key in keys)
    expected = truth.get("found_trunks", truth["trunks"])
    assert sum(len(part.sites) for part in found) == truth["sites"] - hidden
    assert trunks == (expected if whole else truth.get("graph_trunks", expected))
    for part in found:
        assert all(entry.reason for entry in part.rejected)


def find(graph: Graph) -> Residuals:
    """The residuals of a graph, with equal slices merged as `canonicalize_pass` does it."""
    merge_equal_slices(graph)
    return find_residuals(graph)


def test_every_model_has_its_truth():
    assert BUILDERS.keys() == TRUTH.keys()


def test_hardly_any_true_site_is_missed():
    """Of graphs alone, and of conversion, which sees how a model runs through its graph breaks."""
    sites = sum(truth["sites"] for truth in TRUTH.values())
    cut = sum(truth.get("cut", 0) for truth in TRUTH.values())
    lost = sum(truth.get("lost", 0) for truth in TRUTH.values())
    assert cut / sites < 0.01
    assert lost / sites < 0.003


@pytest.mark.parametrize("name", models(TRUTH))
def test_sites_and_trunks_of_the_dynamo_graphs_are_the_true_ones(name):
    model, inputs = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs = captures(model, **inputs)
    check(name, [find(graph) for graph in graphs])


@pytest.mark.slow
@pytest.mark.parametrize("name", models(TRUTH))
def test_sites_and_trunks_of_the_exported_graph_are_the_true_ones(name):
    model, inputs = build(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, (), inputs, strict=False)
        except Exception as error:
            # Of truth.json: what torch says of a model whose control flow depends on its data.
            expected = TRUTH[name].get("no_export", "")
            if not expected or expected not in str(error):
                raise
            pytest.skip(f"torch.export: {expected}")
    check(name, [find(program.module().graph)], whole=True)


@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n"])
@pytest.mark.slow
def test_models_with_streams_of_their_own_are_refused_by_name_of_the_clause(name):
    model, inputs = build(name)
    rejected = [
        entry for graph in captures(model, **inputs) for entry in find_residuals(graph).rejected
    ]
    assert any(entry.clause == "already hyper-connected" for entry in rejected)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_position_bias_shared_by_all_layers_is_no_site_even_with_a_batch_of_one(batch):
    model, inputs = build("t5")
    model.set_attn_implementation("eager")
    inputs = {
        key: value[:batch] if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    check("t5", [find_residuals(graph) for graph in captures(model, **inputs)])
