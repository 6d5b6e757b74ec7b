"""Graphs before and after each pass, as files that `diff -r` can compare.

Layout of a dump::

    DIR/summary.txt   report.json
    DIR/graph_0/fw/00_before.txt  01_<pass>.txt ...  99_after.txt  before_after.diff

Two dumps of the same model differ in nothing but the ``environment`` block of ``report.json``: no
times, addresses, weights or unordered collections are written.
"""

import difflib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mhc_compile.errors import ConfigError
from mhc_compile.report import Report
from mhc_compile.tables import report_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One graph at one point of the pass pipeline."""

    graph: int
    """Which graph of the model; more than one means graph breaks."""
    number: int
    """Position in the pipeline: 0 is the graph as captured, 99 the result."""
    name: str
    """``before``, the name of the pass that has just run, or ``after``."""
    text: str
    """The graph as readable text."""


def write_dump(directory: Path, stages: Sequence[Stage], report: Report) -> list[Path]:
    """Write the stages and the report below ``directory``; a dump already there is replaced.

    Args:
        directory: created if need be.
        stages: of one graph or several, in any order; a graph's lowest and highest number are its
            before and after.
        report: what was found and rewritten.

    Returns:
        The files written, in the order of their names.

    Raises:
        ConfigError: ``directory`` holds something that is no dump.
    """
    _clear(directory)
    written = [_write(directory / "summary.txt", report_text(report))]
    ordered = sorted(stages, key=lambda stage: (stage.graph, stage.number))
    graphs = []
    for graph, members in groupby(ordered, key=lambda stage: stage.graph):
        group = list(members)
        folder = directory / f"graph_{graph}" / "fw"
        for stage in group:
            written.append(_write(folder / _file_name(stage), stage.text))
        written.append(_write(folder / "before_after.diff", _diff(group[0], group[-1])))
        graphs.append({"graph": graph, "fw": [_file_name(stage) for stage in group]})
    content = {
        "schema": SCHEMA_VERSION,
        "environment": environment(),
        "graphs": graphs,
        "report": report.to_dict(),
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    written.append(_write(directory / "report.json", text))
    return sorted(written)


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


def _file_name(stage: Stage) -> str:
    return f"{stage.number:02d}_{stage.name}.txt"


def _diff(before: Stage, after: Stage) -> str:
    lines = difflib.unified_diff(
        before.text.splitlines(),
        after.text.splitlines(),
        _file_name(before),
        _file_name(after),
        lineterm="",
    )
    return "".join(f"{line}\n" for line in lines)


def _clear(directory: Path) -> None:
    """Remove an earlier dump, and nothing else: stages of other passes must not stay behind."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not _is_dump(directory / "report.json"):
        raise ConfigError(f"{directory} is not empty and holds no dump: name another folder")
    for folder in directory.glob("graph_*"):
        shutil.rmtree(folder)


def _is_dump(path: Path) -> bool:
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema", "environment", "graphs"} <= content.keys()


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.endswith("\n") or not text else f"{text}\n", encoding="utf-8")
    return path
