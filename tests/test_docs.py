"""README and docs/: pages of bounded length, links that lead somewhere, and no page left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
LONGEST = {"README.md": 1000}
LONGEST_GUIDE = 900
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=name_of)
def test_a_page_can_be_read_in_five_minutes(page: Path) -> None:
    # The rules and the bars of a table are no words.
    words = sum(bool(re.search(r"\w", word)) for word in page.read_text(encoding="utf-8").split())
    assert words <= LONGEST.get(name_of(page), LONGEST_GUIDE)


@pytest.mark.parametrize("page", [*PAGES, *GUIDES, *RESULTS], ids=name_of)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for groups in LINK.findall(page.read_text(encoding="utf-8")):
        link = "".join(groups)
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("index", "pages"),
    [
        (ROOT / "docs" / "index.md", [*GUIDES, ROOT / "docs" / "first-request.ipynb"]),
        (ROOT / "docs" / "results" / "index.md", RESULTS),
    ],
    ids=["guides", "results"],
)
def test_an_index_lists_every_page_of_its_folder(index: Path, pages: list[Path]) -> None:
    text = index.read_text(encoding="utf-8")
    assert [page.name for page in pages if page != index and f"]({page.name})" not in text] == []
