"""A dump is a folder of texts that two runs write alike."""

import json
from pathlib import Path

import pytest

from mhc_compile.dump import Stage, write_dump
from mhc_compile.errors import ConfigError
from tests.reports import example_report

STAGES = [
    Stage(0, 99, "after", "x = 1\ny = pre(x)\n"),
    Stage(0, 0, "before", "x = 1\ny = add(x)\n"),
    Stage(0, 3, "widen_trunks_pass", "x = 1\ny = post(x)"),
    Stage(1, 0, "before", "z = 2\n"),
    Stage(1, 99, "after", "z = 2\n"),
]


def _texts(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout_is_one_folder_a_graph_with_numbered_stages(tmp_path: Path) -> None:
    written = write_dump(tmp_path, STAGES, example_report())
    names = [path.relative_to(tmp_path).as_posix() for path in written]
    assert names == sorted(_texts(tmp_path))
    assert names == [
        "graph_0/fw/00_before.txt",
        "graph_0/fw/03_widen_trunks_pass.txt",
        "graph_0/fw/99_after.txt",
        "graph_0/fw/before_after.diff",
        "graph_1/fw/00_before.txt",
        "graph_1/fw/99_after.txt",
        "graph_1/fw/before_after.diff",
        "report.json",
        "summary.txt",
    ]


def test_diff_is_unified_and_between_first_and_last_stage(tmp_path: Path) -> None:
    write_dump(tmp_path, STAGES, example_report())
    texts = _texts(tmp_path)
    assert texts["graph_0/fw/before_after.diff"] == (
        "--- 00_before.txt\n+++ 99_after.txt\n@@ -1,2 +1,2 @@\n x = 1\n-y = add(x)\n+y = pre(x)\n"
    )
    assert texts["graph_1/fw/before_after.diff"] == ""


def test_two_dumps_are_equal_byte_for_byte(tmp_path: Path) -> None:
    write_dump(tmp_path / "a", STAGES, example_report())
    write_dump(tmp_path / "b", list(reversed(STAGES)), example_report())
    assert _texts(tmp_path / "a") == _texts(tmp_path / "b")


def test_only_the_environment_block_depends_on_the_machine(tmp_path: Path) -> None:
    write_dump(tmp_path, STAGES, example_report())
    content = json.loads((tmp_path / "report.json").read_text())
    assert content.keys() == {"schema", "environment", "graphs", "report"}
    assert content["environment"].keys() == {"mhc_compile", "torch", "python", "platform"}
    assert content["report"] == json.loads(example_report().to_json())


def test_an_earlier_dump_is_replaced_whole(tmp_path: Path) -> None:
    write_dump(tmp_path, STAGES, example_report())
    write_dump(tmp_path, STAGES[:2], example_report())
    assert not (tmp_path / "graph_1").exists()
    assert not (tmp_path / "graph_0" / "fw" / "03_widen_trunks_pass.txt").exists()


@pytest.mark.parametrize("content", [None, "not json", '{"schema": 1}', "[]"])
def test_a_folder_of_other_files_is_refused_and_kept(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "graph_0").mkdir()
    (tmp_path / "graph_0" / "mine.txt").write_text("precious")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match="holds no dump"):
        write_dump(tmp_path, STAGES, example_report())
    assert (tmp_path / "graph_0" / "mine.txt").read_text() == "precious"
