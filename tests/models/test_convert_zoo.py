"""Conversion of real architectures: what was there stays, and what is new learns.

One trial a model (`tests.models.trial`) serves all tests of this file.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mhc_compile
from tests.models.trial import (
    OUTPUT_BOUND,
    STEPS,
    Comparison,
    Trial,
    convert,
    reloads,
    run_trial,
    train,
)

TRUTH = json.loads((Path(__file__).parent / "truth.json").read_text())

LAYERS = {  # stacks of (layers, residual adds in each)
    "gpt2": [(3, 2)],
    "llama": [(3, 2)],
    "qwen3": [(3, 2)],
    "mixtral": [(3, 2)],
    "bert": [(3, 2)],
    "vit": [(3, 2)],
    "t5": [(3, 2), (2, 3)],  # encoder; decoder with cross-attention
    "timm_vit_ls": [(4, 2)],
    "resnet18": [(2, 1), (2, 1), (2, 1), (2, 1)],
}


def _models() -> Iterator[object]:
    """Every other architecture; ``make models`` takes all of them into docs/models.md."""
    for place, name in enumerate(TRUTH):
        group = pytest.mark.xdist_group(f"trial of {name}")
        if name in LAYERS:
            yield pytest.param(name, marks=group)
        elif place % 2:
            yield pytest.param(name, marks=[group, pytest.mark.slow])


@pytest.fixture(scope="module", params=_models())
def named_trial(request: pytest.FixtureRequest) -> tuple[str, Trial]:
    torch.compiler.reset()
    return request.param, run_trial(request.param)


@pytest.fixture
def trial(named_trial: tuple[str, Trial]) -> Trial:
    return named_trial[1]


def compared(trial: Trial) -> Comparison:
    assert trial.comparison is not None
    return trial.comparison


def test_number_of_sites_is_that_of_the_architecture(named_trial: tuple[str, Trial]) -> None:
    name, trial = named_trial
    truth = TRUTH[name]
    assert len(trial.report.sites) == truth["sites"] - truth.get("lost", 0)
    if name in LAYERS:
        assert truth["sites"] == sum(layers * sites for layers, sites in LAYERS[name])
        assert truth["trunks"] == [layers * sites for layers, sites in LAYERS[name]]


def test_every_site_is_converted_or_left_with_its_reason(named_trial: tuple[str, Trial]) -> None:
    name, trial = named_trial
    sites = trial.report.sites
    assert len(trial.report.converted) >= 0.95 * len(sites) - TRUTH[name].get("left", 0)
    assert all(site.status == "converted" or site.reason for site in sites)
    assert all(site.parameters > 0 for site in trial.report.converted)


def test_outputs_are_those_of_the_plain_model(named_trial: tuple[str, Trial]) -> None:
    name, trial = named_trial
    bound = 2e-6 if name in LAYERS else OUTPUT_BOUND
    assert trial.eval_error is not None
    assert trial.eval_error <= bound
    assert compared(trial).outputs <= bound
    assert compared(trial).buffers <= bound


def test_gradients_of_old_parameters_are_those_of_the_plain_model(
    named_trial: tuple[str, Trial],
) -> None:
    name, trial = named_trial
    if trial.rounding is None:
        assert compared(trial).within_bounds, compared(trial)
    else:  # float32 does not reach the bounds, converted or not
        plain, ours = trial.rounding
        assert ours <= plain
        assert compared(trial).outputs <= OUTPUT_BOUND
    if name in LAYERS:
        assert compared(trial).dtype == "float32"


def test_second_backward_gives_the_same_bits(trial: Trial) -> None:
    assert compared(trial).repeats


def test_state_dict_of_the_plain_model_lacks_only_our_keys(trial: Trial) -> None:
    assert trial.missing == []
    assert trial.unexpected == []


def test_trained_model_computes_the_same_bits_after_saving_and_loading(
    named_trial: tuple[str, Trial],
) -> None:
    assert reloads(*named_trial)


def test_a_few_steps_of_training_lower_the_loss_where_they_lower_the_plain_one(
    trial: Trial,
) -> None:
    assert len(trial.losses) == len(trial.plain_losses) == STEPS + 1
    assert trial.plain_losses[-1] < trial.plain_losses[0], "no rate is small enough"
    assert trial.losses[-1] < trial.losses[0]


def test_training_reaches_every_new_parameter_and_parts_the_streams() -> None:
    trial = convert("gpt2")
    model, inputs = trial.model, trial.inputs
    (trunk,) = trial.report.trunks
    n, last = 4, len(trunk.sites) - 1
    before = mhc_compile.stability(model, **inputs).trunks[0].spread
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = train(trial.call, inputs, optimizer, steps=20)
    (after,) = mhc_compile.stability(model, **inputs).trunks

    assert losses[-1] < 0.9 * losses[0]
    assert before < 1e-6
    assert after.spread > 5e-5
    for step, name in enumerate(trunk.sites):
        owner, _, key = name.rpartition(".")
        site = model.get_submodule(f"{owner}.mhc.{key}")
        moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in site.named_parameters()}
        assert moments.keys() == {"phi", "bias", "alpha"}
        # Equal streams, and their mean, are the same under every doubly stochastic H_res: it has
        # no say at the first site of a trunk and at the last.
        reached = n * n + 2 * n if 0 < step < last else 2 * n
        for part in ("bias", "phi"):
            assert (moments[part][..., :reached] > 0).all(), f"{part} of {name}"
        assert (moments["alpha"][: 3 if 0 < step < last else 2] > 0).all(), name
