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
from typing import Any

import pytest
import torch

from mhc_compile.errors import KernelError, MHCWarning
from mhc_compile.kernels import select
from mhc_compile.kernels.cpp import build, launch
from mhc_compile.kernels.cpp.select import build_failure, obstacle
from mhc_compile.kernels.spec import SiteSpec

ROOT = Path(__file__).parents[2]
ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has loaded nothing yet."""
    monkeypatch.setenv("MHC_COMPILE_CACHE", str(tmp_path / "cache"))
    memos = (build.load, build_failure, launch.library, select._warn, select._log)
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
    ("fields", "dtype", "reason"),
    [
        ({"dim": -2}, torch.float32, "channels are on axis -2"),
        ({"streams": 9}, torch.float32, "9 streams, not 2 to 8"),
        ({"dynamic": False}, torch.float32, "mappings are static"),
        ({}, torch.float64, "streams are torch.float64"),
        ({}, torch.float16, "streams are torch.float16"),
    ],
)
def test_what_cpp_cannot_run_has_a_reason(
    fields: dict[str, Any], dtype: torch.dtype, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(SiteSpec(streams=2), **fields)
    X = torch.zeros(3, spec.streams, 8, dtype=dtype)
    assert reason in str(obstacle(spec, X))
    select._log.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select.launcher("mhc::pre", spec, X) is None
    assert [reason in record.message for record in caplog.records] == [True]
    forced = replace(spec, kernels="cpp")
    with pytest.raises(KernelError, match=f"{reason}.*; use kernels='auto'"):
        select.launcher("mhc::pre", forced, X)


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
    spec = SiteSpec(streams=3)
    tensors = [torch.randn(shape) for shape in ((37, 3, 50), (150, 15), (15,), (3,))]
    texts = [replace(spec, kernels=kernels).encode() for kernels in ("cpp", "reference")]
    results = []
    monkeypatch.setattr(build, "_FLAGS", flags)
    for text in texts:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        u, h_post, h_res, _ = torch.ops.mhc.pre(*leaves, text)
        out = torch.ops.mhc.post(leaves[0], u, h_post, h_res, text)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_libraries_are_loaded_once_per_process() -> None:
    spec = SiteSpec(streams=2, constraint="identity")
    built = launch.library(spec, torch.float32)
    assert isinstance(built, ctypes.CDLL)
    assert launch.library(spec, torch.float32) is built
