"""Tests marked ``interpreted`` run in Triton's interpreter, in one other process for each file.

Triton reads ``TRITON_INTERPRET`` while it is imported, so a process either interprets kernels or
compiles them. Here the tests of one file that were selected are handed to a pytest with the
variable set, which imports once for all of them; each then takes its outcome from there.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_OUTCOMES = "MHC_TEST_OUTCOMES"  # where the other process writes, one JSON object a line

if INTERPRETING:
    from tests.kernels.triton import interpreter

    interpreter.enable()


class Outcome(TypedDict):
    """What the other process says about one test."""

    test: str
    outcome: str
    text: str


_RUNS = pytest.StashKey[dict[Path, tuple[dict[str, Outcome], str]]]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Instead of the test's body, look up how it went in the other process."""
    if INTERPRETING or "interpreted" not in pyfuncitem.keywords:
        return None
    runs = pyfuncitem.session.stash.setdefault(_RUNS, {})
    if pyfuncitem.path not in runs:
        runs[pyfuncitem.path] = _interpret(pyfuncitem.session, pyfuncitem.path)
    outcomes, output = runs[pyfuncitem.path]
    found = outcomes.get(_name(pyfuncitem))
    if found is None:
        pytest.fail(f"the interpreting process ended before this test:\n{output}", pytrace=False)
    if found["outcome"] == "skipped":
        pytest.skip(found["text"])
    if found["outcome"] != "passed":
        pytest.fail(found["text"], pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the other process: write the outcome of each test down, or of its broken fixture."""
    target = os.environ.get(_OUTCOMES)
    if target and INTERPRETING and (report.when == "call" or not report.passed):
        outcome = Outcome(test=report.nodeid, outcome=report.outcome, text=report.longreprtext)
        with Path(target).open("a") as file:
            file.write(json.dumps(outcome) + "\n")


def _interpret(session: pytest.Session, path: Path) -> tuple[dict[str, Outcome], str]:
    """Run the selected tests of a file; returns their outcomes and what was printed."""
    chosen = [
        _name(item)
        for item in session.items
        if item.path == path and "interpreted" in item.keywords
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments, outcomes = Path(folder) / "arguments", Path(folder) / "outcomes"
        arguments.write_text("\n".join(chosen))
        outcomes.touch()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{arguments}"],
            env={**os.environ, "TRITON_INTERPRET": "1", _OUTCOMES: str(outcomes)},
            cwd=session.config.rootpath,
            capture_output=True,
            text=True,
            check=False,
        )
        lines: list[Outcome] = [json.loads(line) for line in outcomes.read_text().splitlines()]
    return {line["test"]: line for line in lines}, (done.stdout + done.stderr)[-4000:]


def _name(item: pytest.Item) -> str:
    """Of a test, without the group that pytest-xdist appends."""
    return item.nodeid.partition("@")[0]
