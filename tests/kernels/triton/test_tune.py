"""Autotuning: which tiles are tried, who chooses, what is kept; timed by a clock of our own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import tune
from mhc_compile.kernels.triton.emit import kernels, source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.maps import maps_of
from mhc_compile.kernels.triton.signatures import aot_variants
from mhc_compile.kernels.triton.stats import kernel_stats
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.tiles import Tile, tile
from tests.kernels.triton.sites import check, error, exact_seam, make_seam, make_spec, run_seam

FOUR = SiteSpec(streams=4, branch_norm="layer")
SIZED = ("_backward_maps", "_backward_streams", "_backward_phi")


def rule(kernel: str, target: str = "sm_90", channels: int = 1280) -> Tile:
    return tile(kernel, maps_of(kernel, FOUR), channels, torch.bfloat16, TARGETS[target])


@pytest.mark.parametrize("target", list(TARGETS))
def test_candidates_differ_from_the_rule_in_one_number_each(target: str) -> None:
    for kernel in kernels(FOUR):
        first, *others = tune.candidates(kernel, rule(kernel, target))
        assert first == rule(kernel, target)
        assert len(others) <= 8
        for other in others:
            changed = [
                first.constants[name] != value for name, value in other.constants.items()
            ] + [first.warps != other.warps, first.stages != other.stages]
            assert sum(changed) == 1, (kernel, other)


def test_numbers_that_other_tensors_depend_on_stay() -> None:
    for kernel in kernels(FOUR):
        sizes = {"SLICE", "SPAN", "C"}
        if kernel.endswith(SIZED):
            sizes |= {"BT"} if kernel.endswith("_maps") else {"BT", "BC"}
        for found in tune.candidates(kernel, rule(kernel)):
            kept = {name: found.constants.get(name) for name in sizes}
            assert kept == {name: rule(kernel).constants.get(name) for name in sizes}


def test_sums_of_partial_results_are_not_tuned() -> None:
    for kernel in ("sum_rows", "sum_products", "pre_sum_maps"):
        assert tune.candidates(kernel, rule(kernel)) == [rule(kernel)]


class Clock:
    """Says of the tile that runs what ``cost`` gives, and counts."""

    def __init__(self, cost: Callable[[Tile], float]) -> None:
        self.cost, self.asked, self.running = cost, 0, Tile(constants={}, warps=1)

    def __call__(self, run: Callable[[], object]) -> float:
        self.asked += 1
        run()
        return self.cost(self.running)

    def run(self, chosen: Tile) -> None:
        self.running = chosen


def choose(path: Path, kernel: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Tile:
    monkeypatch.setattr(tune, "milliseconds", clock)
    return tune.Choices(path).choose(kernel, rule(kernel), clock.run)


def test_the_fastest_wins_and_the_rule_on_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    wide = Clock(lambda tile: 1.0 / tile.warps)
    assert choose(path, "seam", wide, monkeypatch) == replace(rule("seam"), warps=8)
    assert wide.asked == len(tune.candidates("seam", rule("seam")))
    assert choose(path, "post", Clock(lambda tile: 1.0), monkeypatch) == rule("post")


def test_choices_are_kept_on_disk_beside_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "tiles.json"
    mine = tune.Choices(path)
    found = choose(path, "seam", Clock(lambda tile: 1.0 / tile.warps), monkeypatch)
    clock = Clock(lambda tile: float(tile.warps))
    monkeypatch.setattr(tune, "milliseconds", clock)
    other = mine.choose("pre", rule("pre"), clock.run)  # has read the file before it was there
    again = tune.Choices(path)
    assert (again.get("seam"), again.get("pre"), again.get("post")) == (found, other, None)
    assert set(json.loads(path.read_text())) == {"seam", "pre"}
    assert list(path.parent.iterdir()) == [path]


def test_a_tile_that_does_not_fit_is_never_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    def cost(tile: Tile) -> float:
        if tile.warps > 4:
            raise OutOfResources(300_000, 228_000, "shared memory")
        return 1.0

    chosen = choose(tmp_path / "tiles.json", "seam", Clock(cost), monkeypatch)
    assert chosen == rule("seam")


def test_nothing_is_timed_on_a_cpu_for_few_tokens_or_in_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module:
        capturing = False

        def is_current_stream_capturing(self) -> bool:
            return self.capturing

    module, gpu, target = Module(), torch.device("cuda", 0), TARGETS["sm_90"]
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert tune.can_time(gpu, 4096, target)
    assert not tune.can_time(gpu, 512, target)
    assert not tune.can_time(torch.device("cpu"), 4096, target)
    module.capturing = True
    assert not tune.can_time(gpu, 4096, target)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    """Every launch can be timed; the more warps the better."""
    clock = Clock(lambda tile: 1.0)
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "milliseconds", clock)
    monkeypatch.setattr(tune, "can_time", lambda device, tokens, target: True)
    yield clock
    tune.choices_of.cache_clear()


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["identity", "none"])
def test_every_candidate_agrees_with_float64(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path))
    seam = make_seam(make_spec(name, 2), 37, 72)
    truth = exact_seam(seam)
    for number in range(9):

        def nth(kernel: str, first: Tile, number: int = number) -> Tile:
            found = tune.candidates(kernel, first)
            return found[min(number, len(found) - 1)]

        monkeypatch.setattr(
            "mhc_compile.kernels.triton.site.tile", lambda *of: nth(of[0], tile(*of))
        )
        check(run_seam(seam), truth)


@pytest.mark.interpreted
def test_the_first_run_chooses_and_later_ones_ask_no_clock(timed: Clock) -> None:
    spec = replace(make_spec("identity", 2), autotune=True)
    seam = make_seam(spec, 19, 48)
    first = run_seam(seam)
    asked = timed.asked
    assert asked > 20
    second = run_seam(seam)
    assert timed.asked == asked
    assert all(error(first[name], second[name]) == 0 for name in first)
    check(first, exact_seam(seam))


@pytest.mark.interpreted
def test_without_the_option_no_clock_is_asked(timed: Clock) -> None:
    run_seam(make_seam(make_spec("identity", 2), 19, 48))
    assert timed.asked == 0


@pytest.mark.parametrize(
    "kernel",
    [
        "post",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("seam", "seam_scan", "pre_mix", "seam_backward_maps", "seam_backward_phi")
        ),
    ],
)
def test_candidates_compile_ahead_of_time(kernel: str) -> None:
    spec = FOUR.without_norm
    module = load(source(spec, torch.bfloat16))
    variants = {v[0]: v for v in aot_variants(spec, torch.bfloat16, 512, "sm_90")}
    name, signature, _, options = variants[kernel]
    for found in tune.candidates(kernel, rule(kernel, channels=512)):
        own = {**options, "num_warps": found.warps, "num_stages": found.stages}
        variant = (name, signature, found.constants, own)
        assert kernel_stats(getattr(module, name), variant, "sm_90").registers > 0
