"""A dump is a folder of texts that two runs write alike."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from mhc_compile.dump import write_dump
from mhc_compile.errors import ConfigError
from mhc_compile.pictures.view import GraphView, ViewEdge, ViewNode
from mhc_compile.recorder import GraphRecord, Recorder, merged
from mhc_compile.stages import DumpOptions, Stage
from tests.reports import example_report

VIEW = GraphView(
    (
        ViewNode(lines=("x <input>",), role="input", column=0, path=""),
        ViewNode(lines=("f & g", "2×8"), role="box", column=1, path=""),
        ViewNode(lines=("+",), role="add", column=0, path="", title="model.py:12"),
    ),
    (ViewEdge(0, 1), ViewEdge(0, 2, "state"), ViewEdge(1, 2)),
    notes=("3 operations are not drawn",),
)


def _stages() -> list[Stage]:
    def stage(graph: int, number: int, name: str, text: str, **counts: int) -> Stage:
        return Stage(graph=graph, number=number, name=name, text=text, counts=counts)

    return [
        replace(stage(0, 99, "after", "x = 1\ny = pre(x)\n", pre=1), view=VIEW),
        replace(stage(0, 0, "before", "x = 1\ny = add(x)\n", add=1), view=VIEW),
        stage(0, 3, "widen_trunks_pass", "x = 1\ny = post(x)", post=1),
        stage(1, 0, "before", "z = 2\n"),
        stage(1, 99, "after", "z = 2\n"),
    ]


def _recorder(stages: list[Stage], **options: object) -> Recorder:
    recorder = Recorder(DumpOptions(**options))  # type: ignore[arg-type]
    for number in sorted({stage.graph for stage in stages}):
        record = GraphRecord(number, recorder.options)
        record.stages = [stage for stage in stages if stage.graph == number]
        recorder.graphs.append(record)
    recorder.graphs[0].traffic = [{"op": "mhc.pre", "calls": 2, "read": 1024, "written": None}]
    recorder.graphs[0].kernels = {"sinkhorn_n4_float32.cpp": "int x;\n"}
    recorder.graphs[0].excerpts = {"model.py:12": ">    12  x = x + f(x) < 1"}
    return recorder


def _texts(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_layout_is_one_folder_a_graph_with_numbered_stages(tmp_path: Path) -> None:
    written = write_dump(tmp_path, _recorder(_stages()), example_report())
    names = [path.relative_to(tmp_path).as_posix() for path in written]
    assert names == sorted(_texts(tmp_path))
    assert names == [
        "graph_0/fw/00_before.txt",
        "graph_0/fw/03_widen_trunks_pass.txt",
        "graph_0/fw/99_after.txt",
        "graph_0/fw/before_after.diff",
        "graph_0/kernels/sinkhorn_n4_float32.cpp",
        "graph_1/fw/00_before.txt",
        "graph_1/fw/99_after.txt",
        "graph_1/fw/before_after.diff",
        "index.html",
        "report.json",
        "summary.txt",
    ]


def test_formats_and_stage_choose_the_files(tmp_path: Path) -> None:
    recorder = _recorder(_stages(), formats=("dot", "svg"), stage="before")
    write_dump(tmp_path, recorder, example_report())
    assert sorted(name for name in _texts(tmp_path) if "/fw/0" in name or "/fw/9" in name) == [
        "graph_0/fw/00_before.dot",
        "graph_0/fw/00_before.svg",
    ]
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("formats", ("txt", "pdf")), ("phases", ("backward",)), ("collapse", "some")],
)
def test_an_unknown_choice_is_refused_with_those_allowed(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="is not allowed: use one of"):
        DumpOptions(**{field: value})  # type: ignore[arg-type]


def test_diff_is_unified_and_between_first_and_last_stage(tmp_path: Path) -> None:
    write_dump(tmp_path, _recorder(_stages()), example_report())
    texts = _texts(tmp_path)
    assert texts["graph_0/fw/before_after.diff"] == (
        "--- 00_before.txt\n+++ 99_after.txt\n@@ -1,2 +1,2 @@\n x = 1\n-y = add(x)\n+y = pre(x)\n"
    )
    assert texts["graph_1/fw/before_after.diff"] == ""


def test_two_dumps_are_equal_byte_for_byte(tmp_path: Path) -> None:
    write_dump(tmp_path / "a", _recorder(_stages()), example_report())
    write_dump(tmp_path / "b", _recorder(list(reversed(_stages()))), example_report())
    a, b = _texts(tmp_path / "a"), _texts(tmp_path / "b")
    page_a, page_b = a.pop("index.html"), b.pop("index.html")
    assert a == b
    assert len(page_a) == len(page_b)


def test_report_fits_its_schema_and_says_what_each_pass_changed(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    write_dump(tmp_path, _recorder(_stages()), example_report())
    content = json.loads((tmp_path / "report.json").read_text())
    schema = json.loads((files("mhc_compile") / "report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(content)
    first, widened, last = content["graphs"][0]["phases"]["fw"]
    assert (first["operations"], first["changed"]) == (1, {})
    assert widened["changed"] == {"add": [1, 0], "post": [0, 1]}
    assert last["changed"] == {"post": [1, 0], "pre": [0, 1]}
    content["graphs"][0]["phases"]["fw"][0]["operations"] = -1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(content)


def test_only_the_environment_block_depends_on_the_machine(tmp_path: Path) -> None:
    write_dump(tmp_path, _recorder(_stages()), example_report())
    content = json.loads((tmp_path / "report.json").read_text())
    assert content.keys() == {"schema", "environment", "graphs", "report"}
    assert content["environment"].keys() == {"mhc_compile", "torch", "python", "platform"}
    assert content["report"] == json.loads(example_report().to_json())


class _Checker(HTMLParser):
    """Every tag is closed, every id is given once, every link leads somewhere in the dump."""

    void = frozenset({"meta", "rect", "path", "circle", "polygon", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_page_is_well_formed_needs_no_network_and_links_to_what_is_there(tmp_path: Path) -> None:
    report = example_report()
    write_dump(tmp_path, _recorder(_stages()), report)
    page = (tmp_path / "index.html").read_text()
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    for link in checker.links:
        if link.startswith("#"):
            assert link[1:] in checker.ids
        else:
            assert (tmp_path / link).is_file()
    assert any(link.startswith("#source-model-py-12") for link in checker.links)
    assert checker.seen.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(checker.seen)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "x &lt;input&gt;" in page
    assert "f &amp; g" in page


def test_tables_of_the_page_have_captions_and_column_heads(tmp_path: Path) -> None:
    write_dump(tmp_path, _recorder(_stages()), example_report())
    page = (tmp_path / "index.html").read_text()
    tables = page.split("<table>")[1:]
    assert len(tables) >= 5
    assert all(t.startswith("<caption>") and '<th scope="col"' in t for t in tables)
    assert page.count('tabindex="0"') == page.count('class="scroll"')


def test_an_earlier_dump_is_replaced_whole(tmp_path: Path) -> None:
    write_dump(tmp_path, _recorder(_stages()), example_report())
    write_dump(tmp_path, _recorder(_stages()[:2], formats=("txt",)), example_report())
    assert not (tmp_path / "graph_1").exists()
    assert not (tmp_path / "index.html").exists()
    assert not (tmp_path / "graph_0" / "fw" / "03_widen_trunks_pass.txt").exists()


@pytest.mark.parametrize("content", [None, "not json", '{"schema": 1}', "[]"])
def test_a_folder_of_other_files_is_refused_and_kept(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "graph_0").mkdir()
    (tmp_path / "graph_0" / "mine.txt").write_text("precious")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match="holds no dump"):
        write_dump(tmp_path, _recorder(_stages()), example_report())
    assert (tmp_path / "graph_0" / "mine.txt").read_text() == "precious"


def test_png_without_graphviz_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="Graphviz"):
        write_dump(tmp_path / "d", _recorder(_stages(), formats=("png",)), example_report())


def test_reports_of_several_graphs_become_one_with_trunks_numbered_through() -> None:
    report = merged([example_report(), example_report()])
    assert [site.trunk for site in report.sites] == [0, 0, -1, 1, 1, -1]
    assert [trunk.index for trunk in report.trunks] == [0, 1]
    assert report.graphs == 2
    assert report.model == "Toy"
    assert report.notes == example_report().notes
