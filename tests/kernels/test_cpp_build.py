"""Building and caching the generated C++, and what happens where it cannot be built."""

import ctypes
import logging
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mhc_compile.errors import KernelError, MHCWarning
from mhc_compile.kernels import select
from mhc_compile.kernels.cpp import build, call
from mhc_compile.kernels.cpp.select import build_failure, obstacle
from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import check, random_site, run_halves, run_seam

ROOT = Path(__file__).parents[2]
ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "cache"))
    memos = (build.load, build_failure, call.library, select._warn, select._log)
    for memo in memos:
        memo.cache_clear()
    yield tmp_path / "cache"
    for memo in memos:
        memo.cache_clear()


def _site(kernels: str = "auto") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    spec = SiteSpec(streams=2, constraint="identity", norm_eps=0.01, kernels=kernels)
    return torch.ones(16, 4), torch.ones(4), torch.ones(3), spec.encode()


def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)


def test_a_built_library_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.load(ANSWER).answer() == 42
    (library,) = cache.glob("*.so")
    assert library.with_suffix(".cpp").read_text() == ANSWER
    assert {path.suffix for path in cache.iterdir()} == {".so", ".cpp"}
    build.load.cache_clear()

    def refuse(*command: str) -> str:
        raise AssertionError(command)

    monkeypatch.setattr(build, "_run", refuse)  # the version was asked for before
    assert build.load(ANSWER).answer() == 42


@pytest.mark.parametrize("part", ["_version", "_processor", "_openmp"])
def test_another_compiler_or_processor_gets_a_library_of_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    build.load(ANSWER)
    build.load.cache_clear()
    monkeypatch.setattr(build, part, lambda *_: "-g")
    build.load(ANSWER)
    assert len(list(cache.glob("*.so"))) == 2


def test_processes_that_build_at_once_all_get_whole_libraries(cache: Path) -> None:
    program = (
        f"from mhc_compile.kernels.cpp import build\nassert build.load({ANSWER!r}).answer() == 42\n"
    )
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert {path.suffix for path in cache.iterdir()} == {".so", ".cpp"}


def test_a_source_the_compiler_refuses_is_an_error_with_its_message(cache: Path) -> None:
    with pytest.raises(KernelError, match="undeclared_thing"):
        build.load("int x = undeclared_thing;\n")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(KernelError, match="MHC_COMPILE_CACHE"):
        build.load(ANSWER)


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_torch_runs_and_the_user_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _no_compiler(monkeypatch)
    X = torch.randn(3, 2, 8)
    with pytest.warns(MHCWarning, match=r"no C\+\+ compiler was found"):
        u, h_post, h_res, _ = torch.ops.mhc.pre(X, *_site())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.mhc.post(X, u, h_post, h_res, _site()[-1])


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_asking_for_cpp_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_compiler(monkeypatch)
    with pytest.raises(KernelError, match=r"mhc::pre: kernels='cpp'.*install g\+\+ or clang"):
        torch.ops.mhc.pre(torch.randn(3, 2, 8), *_site("cpp"))


@pytest.mark.parametrize(
    ("X", "other", "reason"),
    [
        (torch.zeros(3, 2, 8, dtype=torch.float64), None, "streams are torch.float64"),
        (torch.zeros(3, 2, 8), torch.zeros(3, dtype=torch.float64), "an argument is float64"),
        (torch.zeros(3, 2, 8, device="meta"), None, "the state is on meta"),
    ],
)
def test_what_cpp_cannot_run_has_a_reason(
    X: torch.Tensor, other: torch.Tensor | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = SiteSpec(streams=2)
    assert reason in str(obstacle(spec, X, other))
    select._log.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select.launcher("mhc::pre", spec, X, other) is None
    assert [reason in record.message for record in caplog.records] == [True]
    forced = replace(spec, kernels="cpp")
    with pytest.raises(KernelError, match=f"{reason}.*; use kernels='auto'"):
        select.launcher("mhc::pre", forced, X, other)


def test_a_branch_output_wider_than_its_streams_is_left_to_torch() -> None:
    spec, X = SiteSpec(streams=2), torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    assert obstacle(spec, X, branch=X[:, 0]) is None
    assert "wider than its streams" in str(obstacle(spec, X, branch=X[:, 0].float()))


def test_reference_never_asks_for_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_compiler(monkeypatch)
    torch.ops.mhc.pre(torch.randn(3, 2, 8), *_site("reference"))
    assert not cache.exists()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of this family")
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
@pytest.mark.usefixtures("cache")
def test_narrower_vectors_compute_the_same(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [f"-march={processor}" if "march" in flag else flag for flag in build._FLAGS]
    monkeypatch.setattr(build, "_FLAGS", flags)
    for dtype in (torch.float32, torch.float16):
        spec, tensors = random_site("sinkhorn", 3, (37, 50))
        for i in (0, 1, 7, 8):
            tensors[i] = tensors[i].to(dtype).double()
        for run in (run_halves, run_seam):
            plain = run(spec, tensors, dtype, "reference")
            ours = run(spec, tensors, dtype, "cpp")
            check(ours, plain, 1e-5 if dtype == torch.float32 else 2e-3)


def test_libraries_are_loaded_once_per_process() -> None:
    spec = SiteSpec(streams=2, constraint="identity")
    built = call.library(spec, torch.float32)
    assert isinstance(built, ctypes.CDLL)
    assert call.library(spec, torch.float32) is built
