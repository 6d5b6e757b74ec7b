"""What is read back from kernels compiled ahead of time, without a GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import kernels, source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.signatures import Variant, aot_variants
from mhc_compile.kernels.triton.stats import KernelStats, kernel_stats, site_stats
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.traffic import kernel_rows
from tests.kernels.triton import sample_kernels as samples

SITE = SiteSpec(streams=4)
FAMILIES = ("sm_90", "gfx942")


def _variant(name: str, types: dict[str, str], constants: dict[str, int | str]) -> Variant:
    return name, types, constants, {"num_warps": 4}


def _site(names: Sequence[str], channels: int, target: str) -> list[KernelStats]:
    module = load(source(SITE, torch.bfloat16))
    return [
        kernel_stats(getattr(module, variant[0]), variant, target)
        for variant in aot_variants(SITE, torch.bfloat16, channels, target)
        if variant[0] in names
    ]


def _at_least(counts: Mapping[int, int], bits: int) -> int:
    return sum(count for width, count in counts.items() if width >= bits)


def _fault(stats: KernelStats) -> str:
    """What is wrong with a kernel of four streams, if anything."""
    faults = []
    if stats.spills:
        faults.append(f"{stats.spills} bytes spilled")
    if stats.bf16_arithmetic:
        faults.append(f"{stats.bf16_arithmetic} operations on bf16")
    if min((*stats.loads, *stats.stores)) < 32:
        faults.append("streams in pieces of 16 bits")
    # AMD's compiler stores results of matrix products as they lie, 4 numbers to a thread.
    narrowest = 128 if stats.target.startswith("sm_") else 64
    wide = _at_least(stats.loads, 128) + _at_least(stats.stores, narrowest)
    if wide < kernel_rows(kernels(SITE)[stats.kernel], SITE.streams):
        faults.append(f"narrow accesses: {stats.loads}, {stats.stores}")
    return f"{stats.target} {stats.kernel}: {', '.join(faults)}" if faults else ""


@pytest.mark.parametrize("target", FAMILIES)
def test_the_mixing_of_four_streams_fits_registers_and_moves_16_bytes_at_once(target: str) -> None:
    forward, backward = _site(("post", "post_backward"), 1280, target)
    assert [_fault(forward), _fault(backward)] == ["", ""]
    # X and f are five loads of each thread, X' four stores; going back there are X, dX' and f, and
    # dX and df, in a loop that a compiler may unroll.
    assert (forward.loads[128], forward.stores[128]) == (5, 4)
    assert backward.loads[128] % 9 == backward.stores[128] % 5 == 0
    assert 0 < forward.registers <= 64 < backward.registers


def test_the_seam_is_one_kernel_without_spills() -> None:
    (seam,) = _site(("seam",), 1280, "sm_90")
    assert _fault(seam) == ""
    assert seam.shared > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize(
    "channels",
    [
        pytest.param(channels, marks=pytest.mark.xdist_group(f"ahead of time, C={channels}"))
        for channels in (1280, 2560, 4096, 7168)
    ],
)
def test_no_kernel_spills_on_any_target(target: str, channels: int) -> None:
    found = [_fault(stats) for stats in site_stats(SITE, torch.bfloat16, channels, target)]
    assert len(found) > 20
    assert [fault for fault in found if fault] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_no_kernel_of_a_single_pass_spills_on_any_target(target: str) -> None:
    spec = replace(SITE, single_pass=True)
    found = site_stats(spec, torch.bfloat16, 2560, target)
    assert [stats.kernel for stats in found if stats.spills] == []


@pytest.mark.parametrize("target", FAMILIES)
def test_a_row_of_unknown_width_is_read_in_small_pieces(target: str) -> None:
    types = {"x": "*bf16", "y": "*bf16", "width": "i32"}
    found = kernel_stats(samples.narrow_copy, _variant("copy", types, {"B": 1024}), target)
    assert max(found.loads) == max(found.stores) == 16


@pytest.mark.parametrize(("kind", "operations"), [("add", 1), ("negate", 1), ("compare", 0)])
def test_arithmetic_on_bf16_is_counted(kind: str, operations: int) -> None:
    types = dict.fromkeys(("x", "y", "out"), "*bf16")
    variant = _variant("arithmetic", types, {"KIND": kind, "B": 256})
    found = kernel_stats(samples.arithmetic_in_bf16, variant, "sm_90")
    assert found.bf16_arithmetic == operations


def test_spilled_registers_are_counted() -> None:
    types = dict.fromkeys(("x", "y"), "*fp32")
    name, signature, constants, options = _variant("many", types, {"B": 16384})
    tight = kernel_stats(
        samples.many_at_once, (name, signature, constants, {**options, "maxnreg": 32}), "sm_90"
    )
    assert tight.registers <= 32
    assert tight.spills > 0


def test_a_target_without_kernels_is_refused() -> None:
    with pytest.raises(KernelError, match="target='sm_70' is not allowed: use one of sm_80"):
        next(site_stats(SITE, torch.bfloat16, 1280, "sm_70"))


def test_a_kernel_that_does_not_compile_is_named() -> None:
    types = dict.fromkeys(("x", "y"), "*fp32")
    with pytest.raises(KernelError, match="cast does not compile for sm_90"):
        kernel_stats(samples.cast, _variant("cast", types, {"B": 1000}), "sm_90")


def test_an_interpreting_process_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="start it without TRITON_INTERPRET"):
        next(site_stats(SITE, torch.bfloat16, 1280, "sm_90"))
