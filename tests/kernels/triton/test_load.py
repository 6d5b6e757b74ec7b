"""Generated modules in the cache, and what keeps the kernels from an op."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.maps import site_maps
from mhc_compile.kernels.triton.select import obstacle
from mhc_compile.kernels.triton.targets import TARGETS
from mhc_compile.kernels.triton.tiles import one_launch

SPEC = SiteSpec(streams=4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path))
    return tmp_path


def test_a_text_is_written_once_and_imported_from_the_cache(cache: Path) -> None:
    module = load("answer = 42\n")
    assert module.answer == 42
    (path,) = cache.iterdir()
    assert path.read_text() == "answer = 42\n"
    assert load("answer = 42\n") is module
    assert load("answer = 43\n").answer == 43
    assert len(list(cache.glob("mhc_*.py"))) == 2


def test_processes_may_write_the_same_text_at_once(cache: Path) -> None:
    text = "numbers = [" + "1, " * 20000 + "]\n"
    program = (
        f"from mhc_compile.kernels.triton.load import load; print(len(load({text!r}).numbers))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["20000"] * 2
    assert [path.suffix for path in cache.iterdir() if path.is_file()] == [".py"]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="set MHC_COMPILE_CACHE"):
        load("unwritten = True\n")


@pytest.mark.parametrize(
    ("spec", "X", "arguments", "reason"),
    [
        (SPEC, torch.empty(2, 4, 8), {}, "the state is on cpu"),
        (SPEC, torch.empty(2, 4, 8, device="meta"), {}, "the state is on meta"),
    ],
)
def test_other_devices_are_refused(
    spec: SiteSpec, X: torch.Tensor, arguments: dict[str, torch.Tensor], reason: str
) -> None:
    assert obstacle(spec, X, **arguments) == reason


@pytest.mark.parametrize(
    ("spec", "X", "branch", "reason"),
    [
        (SPEC, torch.empty(2, 4, 8), None, None),
        (SPEC, torch.empty(2, 4, 8), torch.empty(2, 8).bfloat16(), None),
        (SPEC, torch.empty(2, 4, 8).double(), None, "streams are torch.float64"),
        (SPEC, torch.empty(2, 4, 8), torch.empty(2, 8).double(), "an argument is float64"),
        (SPEC, torch.empty(2, 4, 8).bfloat16(), torch.empty(2, 8), "wider than its streams"),
        (SiteSpec(streams=4, dim=-3), torch.empty(2, 4, 8, 3, 3), None, "channels are on axis -3"),
        (SPEC, torch.empty(0, 4, 8), None, "it has no tokens"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(
    spec: SiteSpec,
    X: torch.Tensor,
    branch: torch.Tensor | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # takes tensors on the CPU
    found = obstacle(spec, X, branch=branch)
    assert found is None if reason is None else reason in str(found)


def test_one_launch_is_for_many_tokens_of_a_state_that_the_cache_holds() -> None:
    h100 = TARGETS["sm_90"]

    def chosen(channels: int, tokens: int) -> bool:
        return one_launch(site_maps(SPEC), channels, torch.bfloat16, tokens, h100)

    assert chosen(512, 1 << 16)
    assert not chosen(512, 64)
    assert not chosen(7168, 1 << 16)
