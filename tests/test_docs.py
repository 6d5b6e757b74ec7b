"""The docs: pages of the navigation exist, links lead somewhere, pictures are current."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md"]


def _pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _pages(part)]  # type: ignore[union-attr]


def test_every_page_of_the_navigation_exists() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    for page in _pages(config["nav"]):
        assert (DOCS / page).is_file(), page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_every_identifier_of_the_api_pages_exists() -> None:
    for page in DOCS.rglob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            try:
                __import__(name)
            except ImportError:
                assert hasattr(__import__(module, fromlist=[attribute]), attribute), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_pictures_are_those_that_the_code_draws(name: str) -> None:
    from docs.pictures import IMAGES, draw

    for file, svg in draw(name).items():
        assert (IMAGES / file).read_text() == svg, "make pictures"


def test_the_numbers_of_the_page_on_scale_are_those_that_are_computed() -> None:
    from docs.scale_numbers import PAGE, page

    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
    assert "| 27B, width 2560 | 60 |" in text
