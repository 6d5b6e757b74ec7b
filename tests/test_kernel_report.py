"""The report of a site's kernels, and the verb that shows it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mhc_compile import cli, kernel_report
from mhc_compile.kernels.triton.stats import KernelStats


def _stats(kernel: str) -> KernelStats:
    return KernelStats(
        kernel=kernel,
        target="sm_90",
        constants={"C": 1280, "BC": 256},
        warps=2,
        registers=96,
        spills=0,
        shared=1024,
        loads={128: 5, 32: 20},
        stores={128: 4},
        bf16_arithmetic=0,
        seconds=1.0,
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stands for the compiler, which takes a minute; says what it was asked for."""
    asked: list[tuple[object, ...]] = []

    def site_stats(*arguments: object) -> Iterator[KernelStats]:
        asked.append(arguments)
        yield from map(_stats, ("post", "seam"))

    monkeypatch.setattr(kernel_report, "site_stats", site_stats)
    return asked


def test_plain_output_has_resources_and_bytes(
    compiled: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", "--width", "2560", "--target", "gfx942"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "n=4 constraint=sinkhorn: 2560 channels of bfloat16, for gfx942"
    words = [line.split() for line in lines]
    assert ["post", "C=1280", "BC=256", "2", "96", "0", "1,024"] in [line[:7] for line in words]
    assert ["seam", "seam", "10", "10", "1.00", "51,200"] in words
    assert ["seam", "seam_scan", "+", "pre_mix", "14", "10", "1.40", "71,680"] in words
    assert [arguments[2:] for arguments in compiled] == [(2560, "gfx942")]


def test_flags_arrive_at_the_specification(
    compiled: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--streams 2 --constraint sinkhorn_softmax --iters 5 --sinkhorn-eps 0.25 --static"
    assert cli.main(["kernels", *flags.split(), "--dtype", "float16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["site"] == (
        "n=2 constraint=sinkhorn_softmax iters=5 sinkhorn_eps=0.25 pre_eps=1e-06 dynamic=False"
    )
    assert (report["dtype"], report["width"], report["target"]) == ("float16", 1280, "sm_90")
    assert "source" not in report
    assert report["kernels"][0]["loads"] == {"128": 5, "32": 20}
    static = next(form for form in report["traffic"] if form["op"] == "seam")
    assert static["kernels"] == ["static_seam"]
    assert static["bytes"] == static["least_bytes"] == 6 * 1280 * 2


def test_source_is_the_module_and_nothing_else(
    compiled: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", "--source"]) == 0
    text = capsys.readouterr().out
    compile(text, "kernels", "exec")
    assert "def seam(" in text
    assert cli.main(["kernels", "--source", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == text


def test_out_gets_the_source_and_the_report(
    compiled: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", "--out", str(tmp_path / "new")]) == 0
    assert f"note: wrote {tmp_path / 'new' / 'kernels.py'}" in capsys.readouterr().out
    assert "@triton.jit" in (tmp_path / "new" / "kernels.py").read_text()
    assert len(json.loads((tmp_path / "new" / "report.json").read_text())["kernels"]) == 2


def test_on_a_cpu_there_is_a_library_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels", "--target", "cpu", "--dtype", "float32", "--streams", "2", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert "-O3" in report["build"]
    assert report["library_bytes"] > 1000
    moved = {form["op"]: form["rows"] for form in report["traffic"]}
    assert (moved["pre"], moved["post"], moved["post_backward"]) == (3, 5, 8)
    assert cli.main([*arguments[:-1], "--source"]) == 0
    assert "constexpr int N = 2;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target sm_70", "target='sm_70' is not allowed: use one of sm_80"),
        ("--dtype float64", "dtype='float64' is not allowed on sm_90: use one of float32"),
        ("--target cpu --dtype float64", "dtype='float64' is not allowed on cpu"),
        ("--width 0", "width=0 is not allowed"),
        ("--streams 3 --constraint kronecker", "1, 2, 4, 8 or 16 streams, not 3"),
    ],
)
def test_a_bad_value_exits_with_2(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", *flags.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


def test_a_process_that_interprets_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["kernels"]) == 1
    assert "without TRITON_INTERPRET" in capsys.readouterr().err
