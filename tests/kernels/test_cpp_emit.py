"""The text of the generated C++. EXPECTTEST_ACCEPT=1 writes the golden files anew."""

import os
from pathlib import Path

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_of
from mhc_compile.kernels.cpp.emit import site_source, source
from mhc_compile.kernels.spec import SiteSpec

GOLDEN = Path(__file__).parents[1] / "golden"
SPECS = {
    "cpp_sinkhorn_2.cpp": (SiteSpec(streams=2), torch.float32),
    "cpp_sinkhorn_softmax_3.cpp": (
        SiteSpec(
            streams=3, constraint="sinkhorn_softmax", iters=5, sinkhorn_eps=1e-6, pre_eps=1e-6
        ),
        torch.float32,
    ),
    "cpp_identity_4_bf16.cpp": (SiteSpec(streams=4, constraint="identity"), torch.bfloat16),
    "cpp_none_2.cpp": (SiteSpec(streams=2, constraint="none"), torch.float32),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_the_generated_part_is_the_golden_text(name: str) -> None:
    text = site_source(*SPECS[name])
    if os.environ.get("EXPECTTEST_ACCEPT"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_a_constraint_changes_only_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SiteSpec(streams=3)
    before, own = site_source(spec, torch.float32), constraint_of(spec).cpp(spec)
    other = SiteSpec(streams=3, constraint="orthogonal")
    other_before = site_source(other, torch.float32)
    assert before.count(own) == 1
    monkeypatch.setattr(type(CONSTRAINTS["sinkhorn"]), "cpp", lambda self, spec: "// changed\n")
    assert site_source(spec, torch.float32) == before.replace(own, "// changed\n")
    assert site_source(other, torch.float32) == other_before


def test_layout_and_choice_of_kernels_do_not_reach_the_source() -> None:
    plain = source(SiteSpec(streams=4), torch.float32)
    assert source(SiteSpec(streams=4, dim=-3, kernels="cpp"), torch.float32) == plain


def test_epsilons_and_iterations_are_constants_of_the_source() -> None:
    spec = SiteSpec(streams=2, iters=7, sinkhorn_eps=0.125, norm_eps=0.25, pre_eps=0.5)
    text = site_source(spec, torch.float32)
    assert "NORM_EPS = 0.25f" in text
    assert "return sigmoid(h) + 0.5f" in text
    assert "divisors[0] = m[0] + m[2] + 0.125f;" in text
    assert "k < 7;" in text
