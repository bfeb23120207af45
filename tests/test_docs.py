"""What the documents name exists: files of the code, pages, sections of the method."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from preprocessing.readers import READERS
from preprocessing.slide_row import SlideRow

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
CODE = re.compile(
    r"`((?:pathways|preprocessing|hibio|eval|tests|benchmarks|configs|docs)/[\w./-]*)`"
)
SECTION = re.compile(r"docs/method\.md (\d+(?:\.\d+)?)")
ELSEWHERE = re.compile(r"\b(METHOD|ARCHITECTURE)\b")


def pages(root: Path) -> list[Path]:
    """Every page that is kept up to date; dated results speak of the code of their day."""
    found = [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    return sorted(path for path in found if not re.match(r"CHANGELOG|\d{4}-", path.name))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(root: Path) -> Iterator[str]:
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        where = page.relative_to(root)
        for target, anchor in LINK.findall(text):
            if re.match(r"[a-z]+:", target):
                continue
            path = page.parent / target
            if not path.exists():
                yield f"{where} links to {target}, which is not there"
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                yield f"{where} links to {target}#{anchor}, a heading that is not there"
        for name in CODE.findall(text):
            if not (root / name).exists() and not list(root.glob(f"{name}*")):
                yield f"{where} names {name}, which is not there"


def unknown_sections(root: Path) -> Iterator[str]:
    """References of the code to sections of the method, and to documents that are not here."""
    method = (root / "docs/method.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^#+ (\d+(?:\.\d+)?)", method, re.M))
    known |= set(re.findall(r"^\| (\d+\.\d+) \|", method, re.M))
    for folder in ("pathways", "preprocessing", "hibio", "eval", "tests", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            if path == Path(__file__):  # names what it looks for
                continue
            text = path.read_text(encoding="utf-8")
            for section in SECTION.findall(text):
                if section not in known:
                    yield f"{path.relative_to(root)} refers to section {section} of the method"
            if ELSEWHERE.search(text):
                yield f"{path.relative_to(root)} refers to a document that is not here"


def test_links_files_and_sections_exist():
    assert len(pages(ROOT)) > 8
    assert [*broken(ROOT), *unknown_sections(ROOT)] == []


@pytest.mark.parametrize(
    ("page", "code", "words"),
    [
        ("[x](gone.md)", "", "links to gone.md"),
        ("[x](method.md#gone)", "", "a heading that is not there"),
        ("see `hibio/gone.py`", "", "names hibio/gone.py"),
        ("", "# docs/method.md 9.9", "section 9.9"),
        ("", "# METHOD", "not here"),
    ],
)
def test_a_planted_reference_to_nothing_is_found(tmp_path, page, code, words):
    (tmp_path / "docs").mkdir()
    (tmp_path / "hibio").mkdir()
    (tmp_path / "docs/method.md").write_text("# The method\n\n## 1. One\n")
    (tmp_path / "docs/page.md").write_text(f"[m](method.md#1-one) `hibio/here.py` {page}\n")
    (tmp_path / "hibio/here.py").write_text(f"# docs/method.md 1\n{code}\n")
    found = [*broken(tmp_path), *unknown_sections(tmp_path)]
    assert len(found) == 1
    assert words in found[0]


def test_every_format_and_column_is_described():
    """Each reader has its row or point in docs/data.md, each column of the manifest its row."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for name in READERS:
        assert re.search(rf"^(\| `{name}` \||- \*\*.*\(`{name}`\):)", text, re.M), name
    columns = {name for row in re.findall(r"^\| (`.*`) \|", text, re.M) for name in row.split("`")}
    assert {field.name for field in fields(SlideRow)} <= columns
