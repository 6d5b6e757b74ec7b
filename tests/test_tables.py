"""What a report looks like as plain text."""

from dataclasses import replace

from mhc_compile.tables import Table, report_tables, report_text, summary_line, to_text
from tests.reports import example_report


def test_summary_counts_what_was_taken_and_what_was_left() -> None:
    assert summary_line(example_report()) == (
        "Toy: 2 residual sites found in 1 trunk, 1 left as it was, 3 other adds, 1 graph"
    )


def test_parameters_of_a_layer_that_runs_twice_count_once() -> None:
    site = replace(example_report().sites[0], parameters=1000)
    assert summary_line(replace(example_report(), sites=(site, site))).endswith(
        "1 graph, 1,000 new parameters"
    )


def test_rejected_adds_are_grouped_by_clause_with_the_commonest_first() -> None:
    rejected = report_tables(example_report())[-1]
    assert rejected.rows == (
        ("mixing", "2", "model.py:3, model.py:5", "reason of mixing"),
        ("shape", "1", "model.py:4", "reason of shape"),
    )


def test_every_rejected_add_is_listed_on_request_in_graph_order() -> None:
    rejected = report_tables(example_report(), every_add=True)[-1]
    assert [row[0] for row in rejected.rows] == ["model.py:3", "model.py:4", "model.py:5"]
    assert rejected.columns[-1] == "reason"


def test_a_site_that_was_left_shows_its_reason_and_no_trunk() -> None:
    _, sites, _ = report_tables(example_report())
    assert sites.rows[-1][-4:] == ("", "", "", "left: its skip is a slice")
    assert sites.rows[0] == (
        "h.0.add0",
        "identity",
        "dropout",
        "model.py:12",
        "2xs0x64",
        "0",
        "0",
        "0",
        "found",
    )


def test_empty_tables_are_not_shown() -> None:
    empty = replace(example_report(), sites=(), trunks=(), rejected=())
    assert report_tables(empty) == []


def test_text_is_aligned_and_has_no_trailing_blanks() -> None:
    table = Table(title="T", columns=("a", "bcd"), rows=(("long cell", "x"), ("y", "")))
    assert to_text(table) == "T\na          bcd\nlong cell  x\ny"


def test_the_whole_report_ends_with_its_notes() -> None:
    text = report_text(example_report())
    assert text.endswith("note: graph break at model.py:9\n")
    assert "Residual sites" in text
