"""The quality pages: self-contained, escaped, complete, and honest about what could not be read."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from preprocessing import DataError, SlideStore
from preprocessing.pages import data_uri
from preprocessing.qc.figures import Ground, Panel, cohort_dots, flag_maps, histograms, spot_maps
from preprocessing.qc.pages import CohortRow, cohort_page, mark_outliers, qc_folder, slide_ground
from preprocessing.qc.slide import MEASURES, Limits, Measure, shown
from tests.preprocessing.qc_stores import draw_counts, write_slide
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA
from tests.preprocessing.test_qc_patches import INK, glass, painted, tissue


class Outline(HTMLParser):
    """Collects what a page refers to, and checks that its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        values = dict(attrs)
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path: Path) -> tuple[str, Outline]:
    """Read a page; nothing in it may come from elsewhere or run."""
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert not outline.seen & {"script", "link", "iframe", "object"}
    assert all(source.startswith("data:image/") for source in outline.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not re.search(r"\$\w|\bnan\b", re.sub(r"base64,[^\"]*", "", text))
    return text, outline


def write_cohort(folder: Path) -> Path:
    folder.mkdir()
    patches = np.concatenate([tissue(12), glass(2), painted(INK["green"])])
    write_slide(folder, "full", patches=patches)
    write_slide(folder, "counts", n_spots=30, tissue=None)
    write_slide(folder, "proteins", n_spots=30, modality="protein")
    write_slide(folder, "picture", patches=tissue(9), image_only=True, encoding="jpeg")
    write_slide(folder, "lone", n_spots=1)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    return qc_folder(write_cohort(folder / "stores"), folder / "out")


def test_a_folder_of_every_kind(index):
    assert (index.parent.name, index.name) == ("out", "index.html")
    names = {path.name for path in index.parent.iterdir()}
    slides = ("full", "counts", "proteins", "picture", "lone")
    assert names == {"index.html", "qc.csv", *(f"{name}.qc.html" for name in slides)}
    _, outline = check_page(index)
    assert sorted(outline.links) == sorted(f"./{name}.qc.html" for name in slides)
    pages = {name: check_page(index.parent / f"{name}.qc.html")[0] for name in slides}
    for page in pages.values():
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "3 spots &lt;b&gt;left out&lt;/b&gt;" in page
        assert "left out by prepare: 2 spots, off tissue" in page
        assert "all of them stay in the store" in page
    assert "pen mark: 1 of 15 spots (6.7%), at least 10.0%" in pages["full"]
    assert "Ink: green in 1" in pages["full"]
    assert "blank patch: 2 patches, the worst 2 shown" in pages["full"]
    assert "hematoxylin, optical density" in pages["full"]
    assert "No spot is flagged" in pages["lone"]
    assert "low depth" not in pages["proteins"]
    assert "Stain" not in pages["counts"]


def test_the_table_holds_every_number(index):
    with (index.parent / "qc.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["counts", "full", "lone", "picture", "proteins"]
    words = {"slide_id", "patient_id", "modality", "registration", "outliers", "warnings"}
    assert set(rows["full"]) == words | {measure.key for measure in MEASURES}
    counts = draw_counts(30)
    assert float(rows["counts"]["depth_median"]) == np.median(counts.sum(axis=1))
    share = np.median(counts[:, :2].sum(axis=1) / counts.sum(axis=1))
    assert float(rows["counts"]["mito_median"]) == pytest.approx(share, rel=1e-5)
    assert rows["proteins"]["mito_median"] == rows["counts"]["focus_median"] == ""
    assert rows["picture"]["depth_median"] == ""
    assert float(rows["full"]["share_blank_patch"]) == pytest.approx(2 / 15, rel=1e-5)


def test_the_same_stores_give_the_same_pages(index, tmp_path):
    again = qc_folder(index.parents[1] / "stores", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in index.parent.iterdir()}
    for path in index.parent.iterdir():
        assert (again.parent / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_store_is_named_and_the_others_are_written(tmp_path):
    stores = tmp_path / "stores"
    stores.mkdir()
    write_slide(stores, "good", n_spots=6)
    (stores / "bad.h5").write_bytes(b"no store")
    with pytest.raises(DataError, match=r"1 of 2 stores could not be read: .*bad\.h5"):
        qc_folder(stores, tmp_path / "out")
    text, _ = check_page(tmp_path / "out" / "index.html")
    assert "bad.h5" in text
    assert (tmp_path / "out" / "good.qc.html").is_file()
    assert not (tmp_path / "out" / "bad.qc.html").exists()
    with pytest.raises(DataError, match="holds no store"):
        qc_folder(tmp_path / "out", tmp_path / "more")


def row(name: str, depth: float, modality: str = "rna", **numbers: float) -> CohortRow:
    return CohortRow(name, "p", modality, f"{name}.qc.html", {"depth_median": depth} | numbers)


def test_outliers_are_marked_within_their_modality():
    usual = [900.0, 1000, 1100, 1050, 950]
    rows = [row(f"s{i}", depth) for i, depth in enumerate(usual)]
    rows += [row("deep", 90_000.0), row("shallow", 3.0), row("protein", 5.0, "protein")]
    for number, one in enumerate(rows):
        one.numbers |= {"share_pen_mark": 0.3 if number == 0 else 0.0, "mpp": float(number)}
    mark_outliers(rows)
    assert {one.slide_id: one.outliers for one in rows if one.outliers} == {
        "s0": {"share_pen_mark": True},
        "deep": {"depth_median": True},
        "shallow": {"depth_median": False},
    }
    page = cohort_page(rows)
    assert "shallow: depth, median low" in page
    assert "3 ▼" in page
    assert "90,000 ▲" in page
    few = rows[-4:]
    for one in few:
        one.outliers.clear()
    mark_outliers(few)
    assert not any(one.outliers for one in few)
    assert "No slide is far from the others." in cohort_page(few)


def test_names_are_escaped_in_the_index():
    one = CohortRow('<b>"x"', "<i>", "rna", "a b#<.qc.html", {})
    page = cohort_page([one], [("<u>.h5", "<broken>")])
    Outline(page)
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<broken>" not in page
    assert 'href="./a%20b%23%3C.qc.html"' in page


def test_the_ground_lies_under_the_spots(tmp_path):
    with SlideStore(write_slide(tmp_path, "a", patches=tissue(9))) as store:
        ground = slide_ground(store)
        assert ground.picture is not None
        pixel = ground.xy_um / np.array(ground.size_um) * ground.picture.shape[1::-1]
        np.testing.assert_allclose(pixel, store.xy_px0 / store.thumbnail_downsample)
    assert ground.diameter_um == pytest.approx(100)
    with SlideStore(write_slide(tmp_path, "b", n_spots=1)) as store:
        assert slide_ground(store).diameter_um == 100


@pytest.mark.parametrize("n_spots", [1, 2, 30])
def test_figures_of_unusual_values(n_spots):
    xy = np.stack([np.arange(n_spots), np.zeros(n_spots)], axis=1) * 50.0
    ground = Ground(xy, 50.0)
    unusual = [np.zeros(n_spots), np.full(n_spots, np.nan), np.full(n_spots, 7.0), xy[:, 0]]
    panels = [Panel("t", v, log=log) for v in unusual for log in (True, False)]
    assert spot_maps(ground, panels).startswith(b"\xff\xd8")
    assert histograms(panels).startswith(b"\x89PNG")
    flags = {"all": np.ones(n_spots, dtype=bool), "none": np.zeros(n_spots, dtype=bool)}
    assert data_uri(flag_maps(ground, flags)).startswith("data:image/jpeg;base64,")
    dots = [("d", xy[:, 0], Limits(1.0, 0.5, 2.0), True), ("e", xy[:, 0] + 1, Limits(), True)]
    assert data_uri(cohort_dots(dots, ["s"] * n_spots)).startswith("data:image/png;base64,")


def test_numbers_are_shown_with_their_unit():
    assert shown(0.1234, Measure("a", "a", "%", 1)) == "12.3%"
    assert shown(12345.6, Measure("a", "a")) == "12,346"
    assert shown(4.89, Measure("a", "a")) == "4.9"
    assert shown(0.28324, Measure("a", "a", "", 3)) == "0.283"
    assert shown(float("nan"), Measure("a", "a")) == "–"


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_real_slides(tmp_path):
    from preprocessing import prepare
    from preprocessing.manifest import draft_manifest
    from preprocessing.patches import PatchConfig
    from preprocessing.slide_row import SlideRow

    rows = [row for row in draft_manifest(REAL_DATA / "her2st") if row.slide_id in ("A1", "G2")]
    rows.append(SlideRow("grid", "g", REAL_DATA / "breast_dcis_grid", "visium", mpp=0.85))
    report = prepare(rows, tmp_path / "stores", patch=PatchConfig(112.0, 64))
    assert not report.failed
    index = qc_folder(tmp_path / "stores", tmp_path / "out")
    for path in index.parent.glob("*.html"):
        check_page(path)
    with (index.parent / "qc.csv").open(newline="") as file:
        found = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert float(found["A1"]["share_pen_mark"]) < 0.02
    assert float(found["A1"]["hematoxylin_red"]) > float(found["A1"]["eosin_red"])
    assert 0 < float(found["grid"]["mito_median"]) < 0.5
    assert found["G2"]["focus_median"] == ""
