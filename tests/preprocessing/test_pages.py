"""Pages: escaped by the template, whole in one file, and found where the package is installed."""

from importlib.resources import files
from pathlib import Path

from preprocessing.canvas import new_page, picture_of
from preprocessing.pages import (
    Beside,
    Box,
    Bullets,
    Cell,
    Heading,
    Line,
    Picture,
    Section,
    Table,
    Text,
    Verbatim,
    render,
    write_page,
)

EVIL = '<script a="1">&'
SAFE = "&lt;script a=&#34;1&#34;&gt;&amp;"


def test_the_template_is_part_of_the_package() -> None:
    assert files("preprocessing").joinpath("templates/page.html.j2").is_file()
    declared = Path(__file__).parents[2] / "setup.cfg"
    assert "preprocessing = templates/*.j2" in declared.read_text()


def test_everything_is_escaped_once() -> None:
    cell = Cell(EVIL, "words", "best", EVIL, (EVIL,), picture=b"\xff\xd8")
    link = Cell(EVIL, link=EVIL, colour=(1, 2, 3))
    table = Table((EVIL, EVIL), [Line((EVIL, cell)), Line((link, EVIL), "self")], EVIL)
    grouped = Table((EVIL, "b"), [], groups=[(EVIL, 1)], lead=1)
    parts = [
        *(
            table,
            grouped,
            Text(EVIL, "soft", EVIL),
            Heading(EVIL, 3),
            Bullets([EVIL, (EVIL, EVIL)]),
        ),
        *(Picture(b"\x89PNG", EVIL, EVIL, EVIL), Verbatim(EVIL)),
        *(Box(EVIL, [Text(EVIL)]), Beside([Text(EVIL)])),
    ]
    page = render(EVIL, [Section(parts, EVIL, "one"), Section([], "two", "two")])
    assert "<script" not in page
    assert page.count(SAFE) == page.count("script") > 25
    assert "&amp;lt;" not in page
    assert page.startswith("<!DOCTYPE html>\n")
    assert 'style="background:rgb(1,2,3)"' in page
    assert page.count("data:image/") == 2


def test_words_stand_in_cells_without_space_around_them() -> None:
    table = Table(("", "a"), [Line(("row", "1")), Line(("x", Cell("2", beside="(3)")), "chance")])
    page = render("t", [Section([table])])
    assert '<tr><th scope="row">row</th><td>1</td></tr>' in page
    assert '<tr class="chance"><th scope="row">x</th><td>2 <small>(3)</small></td></tr>' in page
    assert "<nav" not in page


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, "first", [])
    write_page(path, "second", [])
    assert "<h1>second</h1>" in path.read_text()
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]


def test_names_are_drawn_as_text_and_never_as_formulas():
    page = new_page(4, 4)
    axes = page.subplots()
    axes.set_title(r"TGF-$\bet{ $")
    axes.plot([1, 1e9])
    axes.set_yscale("log")
    axes.set_xticks([0, 1], ["$x", r"$\frac{$"])
    assert picture_of(page).size == (440, 440)
    assert not axes.title.get_parse_math()
    assert any(label.get_parse_math() for label in axes.get_yticklabels())  # powers of ten
