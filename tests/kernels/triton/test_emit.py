"""The text of the generated Triton. EXPECTTEST_ACCEPT=1 writes the golden files anew."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import STREAM_TYPES, kernels, source
from mhc_compile.kernels.triton.signatures import aot_variants
from mhc_compile.kernels.triton.targets import TARGETS

GOLDEN = Path(__file__).parents[2] / "golden"
SPECS = {
    "triton_sinkhorn_2.py.txt": (SiteSpec(streams=2), torch.float32),
    "triton_sinkhorn_softmax_3.py.txt": (
        SiteSpec(
            streams=3, constraint="sinkhorn_softmax", iters=5, sinkhorn_eps=1e-6, pre_eps=1e-6
        ),
        torch.bfloat16,
    ),
    "triton_identity_2_single_pass.py.txt": (
        SiteSpec(streams=2, constraint="identity", single_pass=True),
        torch.bfloat16,
    ),
    "triton_none_2.py.txt": (SiteSpec(streams=2, constraint="none"), torch.bfloat16),
    "triton_identity_4_static.py.txt": (
        SiteSpec(streams=4, constraint="identity", dynamic=False),
        torch.float16,
    ),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_the_source_is_the_golden_text(name: str) -> None:
    text = source(*SPECS[name])
    if os.environ.get("EXPECTTEST_ACCEPT"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("n", [1, 3, 4, 8, 16])
def test_every_site_has_a_source_that_is_python(n: int, dynamic: bool) -> None:
    for name, kind in CONSTRAINTS.items():
        if (name == "permutations" and n > 5) or (name == "kronecker" and n & (n - 1)):
            continue
        spec = SiteSpec(streams=n, constraint=kind.name, dynamic=dynamic)
        text = source(spec, torch.bfloat16)
        names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        assert kernels(spec).keys() <= names
        assert n > 4 or max(map(len, text.splitlines())) <= 110


def persistent(text: str) -> set[str]:
    """Kernels whose programs take tile after tile of the grid, or loop without a bound."""
    return {
        function.name
        for function in ast.parse(text).body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.While)
        or (isinstance(node, ast.Attribute) and node.attr == "num_programs")
    }


@pytest.mark.parametrize("dynamic", [True, False])
def test_no_kernel_is_persistent_and_keeps_its_processor_from_other_streams(dynamic: bool) -> None:
    for kind in CONSTRAINTS.values():
        spec = SiteSpec(streams=4, constraint=kind.name, dynamic=dynamic)
        assert persistent(source(spec, torch.bfloat16)) == set()
    loop = (
        "def k(X, N):\n    for t in range(tl.program_id(0), N, tl.num_programs(0)):\n        pass"
    )
    assert persistent(loop) == {"k"}


def test_a_constraint_changes_only_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, other = SiteSpec(streams=3), SiteSpec(streams=3, constraint="orthogonal")
    own = constraint_of(spec).triton(spec)
    before, other_before = source(spec, torch.float32), source(other, torch.float32)
    assert before.count(own) == 1
    monkeypatch.setattr(type(CONSTRAINTS["sinkhorn"]), "triton", lambda self, spec: "# changed\n")
    source.cache_clear()
    assert source(spec, torch.float32) == before.replace(own, "# changed\n")
    assert source(other, torch.float32) == other_before
    source.cache_clear()


def test_layout_and_choice_of_kernels_do_not_reach_the_source() -> None:
    plain = source(SiteSpec(streams=4), torch.float32)
    assert source(SiteSpec(streams=4, dim=-3, kernels="reference"), torch.float32) == plain


def test_epsilons_are_constants_of_the_source() -> None:
    text = source(SiteSpec(streams=2, norm_eps=0.25, pre_eps=0.5), torch.float32)
    assert "tl.rsqrt(tl.sum(square0, 1) / (2 * C) + 0.25)" in text
    assert "w1 = tl.sigmoid(h1) + 0.5" in text


@pytest.mark.parametrize("dtype", list(STREAM_TYPES))
def test_no_kernel_computes_before_it_widens(dtype: torch.dtype) -> None:
    # Loads of streams go through `read`, which widens.
    text = source(SiteSpec(streams=4), dtype)
    loads = set(re.findall(r"tl\.load\(([A-Za-z_]+)", text))
    assert loads == {"at", "saved", "ALPHA", "BIAS", "H_POST", "H_RES"}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("channels", [16, 129, 7168])
def test_every_kernel_is_given_a_type_or_a_value_for_each_argument(
    channels: int, target: str, dynamic: bool
) -> None:
    for n in (2, 4, 8):
        spec = SiteSpec(streams=n, dynamic=dynamic)
        variants = aot_variants(spec, torch.bfloat16, channels, target)
        assert [name for name, *_ in variants] == list(kernels(spec))
        for name, signature, constants, options in variants:
            kernel = kernels(spec)[name]
            assert tuple(signature) == kernel.arguments
            assert set(constants) == set(kernel.constants)
            warps = int(options["num_warps"])
            assert warps & (warps - 1) == 0
            sizes = [int(v) for k, v in constants.items() if k[0] == "B"]
            assert all(size & (size - 1) == 0 for size in sizes)
