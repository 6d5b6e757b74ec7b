"""Write what a `Recorder` holds, as files that ``diff -r`` can compare.

Layout of a dump::

    DIR/index.html  summary.txt  report.json
    DIR/graph_0/fw/00_before.txt  01_<pass>.txt ...  99_after.txt  before_after.diff
    DIR/graph_0/bw/..., joint/..., aot_fw/..., aot_bw/...   kernels/*.cpp

Two dumps of the same model differ in nothing but the ``environment`` block of ``report.json``: no
times, addresses, weights or unordered collections are written.
"""

import difflib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mhc_compile.errors import ConfigError
from mhc_compile.page import page
from mhc_compile.pictures.dot import to_dot, to_png
from mhc_compile.pictures.svg import to_svg
from mhc_compile.recorder import Recorder
from mhc_compile.report import Report
from mhc_compile.stages import Stage, count_changes
from mhc_compile.tables import report_text

SCHEMA_VERSION = 2
"""Of ``report.json``; `mhc_compile/report.schema.json` describes it."""


def write_dump(directory: Path, recorder: Recorder, report: Report) -> list[Path]:
    """Write all that was recorded below ``directory``; a dump already there is replaced.

    Args:
        directory: created if need be.
        recorder: its graphs, in any order of their stages; a graph's lowest and highest number of a
            phase are its before and after.
        report: what was found and rewritten.

    Returns:
        The files written, in the order of their names.

    Raises:
        ConfigError: ``directory`` holds something that is no dump, or a picture cannot be drawn.
    """
    _clear(directory)
    files: dict[Path, str | bytes] = {directory / "summary.txt": report_text(report)}
    graphs = []
    for graph in recorder.graphs:
        entry: dict[str, Any] = {"graph": graph.number, "traffic": graph.traffic, "phases": {}}
        folder = directory / f"graph_{graph.number}"
        ordered = sorted(graph.stages, key=lambda stage: (stage.phase, stage.number))
        for phase, members in groupby(ordered, key=lambda stage: stage.phase):
            stages = list(members)
            entry["phases"][phase] = list(_stage_entries(stages))
            files[folder / phase / "before_after.diff"] = diff(stages[0], stages[-1])
            for stage in stages:
                if recorder.options.keeps(stage.number, stage.name):
                    files.update(_stage_files(folder / phase, stage, recorder.options.formats))
        entry["overlap"] = [asdict(overlap) for overlap in graph.overlap]
        entry["kernels"] = sorted(graph.kernels)
        for name, source in graph.kernels.items():
            files[folder / "kernels" / name] = source
        graphs.append(entry)
    content = {
        "schema": SCHEMA_VERSION,
        "environment": environment(),
        "graphs": graphs,
        "report": report.to_dict(),
    }
    files[directory / "report.json"] = json.dumps(content, indent=2, sort_keys=True)
    if "html" in recorder.options.formats:
        files[directory / "index.html"] = page(recorder, report)
    return sorted(_write(path, text) for path, text in files.items())


def write_recorded(recorder: Recorder) -> None:
    """Bring the dump of a recorder with a folder of its own up to date."""
    if recorder.directory is not None:
        write_dump(recorder.directory, recorder, recorder.report)


def environment() -> dict[str, str]:
    """What a result may depend on besides the model: versions and platform."""
    try:
        version = metadata.version("mhc-compile")
    except metadata.PackageNotFoundError:
        version = "not installed"  # runs from a checkout
    return {
        "mhc_compile": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def diff(before: Stage, after: Stage) -> str:
    """The unified diff of two stages; empty if they are equal."""
    lines = difflib.unified_diff(
        before.text.splitlines(),
        after.text.splitlines(),
        f"{before.stem}.txt",
        f"{after.stem}.txt",
        lineterm="",
    )
    return "".join(f"{line}\n" for line in lines)


def _stage_files(
    folder: Path, stage: Stage, formats: Sequence[str]
) -> Iterator[tuple[Path, str | bytes]]:
    path = folder / stage.stem
    if "txt" in formats:
        yield path.with_suffix(".txt"), stage.text
    for suffix, text in stage.files.items():
        yield path.with_suffix(f".{suffix}"), text
    if stage.view is None:
        return
    title = f"graph {stage.graph}, {stage.name}"
    if "svg" in formats:
        yield path.with_suffix(".svg"), to_svg(stage.view, title)
    if "dot" in formats:
        yield path.with_suffix(".dot"), to_dot(stage.view, title)
    if "png" in formats:
        yield path.with_suffix(".png"), to_png(to_dot(stage.view, title))


def _stage_entries(stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    """Number, name and operations of each stage, and what changed since the one before."""
    before: Mapping[str, int] | None = None
    for stage in stages:
        changed = {} if before is None else count_changes(before, stage.counts)
        yield {
            "number": stage.number,
            "name": stage.name,
            "operations": sum(stage.counts.values()),
            "changed": {name: list(pair) for name, pair in changed.items()},
        }
        before = stage.counts


def _clear(directory: Path) -> None:
    """Remove an earlier dump, and nothing else: stages of other passes must not stay behind."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not _is_dump(directory / "report.json"):
        raise ConfigError(f"{directory} is not empty and holds no dump: name another folder")
    for folder in directory.glob("graph_*"):
        shutil.rmtree(folder)
    (directory / "index.html").unlink(missing_ok=True)


def _is_dump(path: Path) -> bool:
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema", "environment", "graphs"} <= content.keys()


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if content.endswith("\n") or not content else f"{content}\n"
        path.write_text(text, encoding="utf-8")
    return path
