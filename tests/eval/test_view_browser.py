"""The page of `hibio view` in a real browser: clicks, keys, areas, two slides, no WebGL, no server.

Skipped where Chromium is not installed.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eval.view import page
from eval.view.cohort import Cohort as Viewed
from eval.view.export import export_page
from tests.eval.chromium import CHROMIUM, Browser, served
from tests.eval.image_cohort import Cohort

SLIDE, OTHER = "sim001", "sim002"
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium to open the page with"),
    pytest.mark.skipif(
        not (page.VENDOR / page.SCRIPT).is_file(),
        reason="no OpenSeadragon in this checkout: `make view-assets`",
    ),
]


AXE = os.environ.get("HIBIO_AXE", "")


@pytest.fixture(scope="module")
def viewed(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    copy = tmp_path_factory.mktemp("browser") / "checkpoint"
    shutil.copytree(cohort.checkpoint, copy)
    slides = cohort.stores.parent / "cohort" / "slides"
    return Viewed(copy, cohort.stores, slides=slides, sets="default", only=[SLIDE, OTHER])


@pytest.fixture(scope="module")
def address(viewed: Viewed) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("uvicorn", reason="needs hibio[view]")
    with served(viewed) as address:
        yield address


def the_drawn_pixels_are_the_values(browser: Browser, viewed: Viewed, true: np.ndarray) -> None:
    """In the middle of every spot, drawn as one vertex and as six; grey where it is not known."""
    paint = """((largest, set) => {
        const pane = panes[0], { layer } = pane, { gl } = layer, [x, y, k] = pane.view();
        layer.largest = largest;
        set.forEach((value, i) => { pane.heat.values[i] = value ?? NaN; });
        pane.colour();
        layer.draw(pane.view(), state.slide.diameter / 2, 1);
        const { xy } = state.slide, up = gl.drawingBufferHeight - 1;
        return set.map((_, i) => {
            const at = [Math.floor(x + k * xy[2 * i]), up - Math.floor(y + k * xy[2 * i + 1])];
            const pixel = new Uint8Array(4);
            gl.readPixels(...at, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, pixel);
            return [...pixel];
        });
    })(%d, %s)"""
    low, high = np.sort(true)[[int(0.02 * len(true)), int(0.98 * len(true))]]
    level = 1 + np.round(254 * np.clip((true - low) / (high - low), 0, 1)).astype(int)
    opaque = np.full((len(true), 1), 255)
    wanted = np.hstack([np.reshape(viewed.facts()["maps"]["viridis"], (-1, 3))[level], opaque])
    for largest in (1024, 0):
        found = browser.value(paint % (largest, true.tolist()))
        np.testing.assert_allclose(found, wanted, atol=3)  # of a level, for a tie in its rounding
    unknown = browser.value(paint % (1024, json.dumps([None, *true.tolist()[1:]])))[0]
    np.testing.assert_allclose(unknown, [150 * 90 / 255] * 3 + [90], atol=1)
    browser.value(paint % (1024, true.tolist()))


def an_area_is_drawn_and_downloaded(browser: Browser, gene: str, true: np.ndarray) -> None:
    browser.value("window.download = (...given) => { window.saved = given; }")
    browser.until("!panes[1].viewer.viewport.zoomSpring.isAtTargetValue() || true")
    time.sleep(0.3)
    corners = [np.array(browser.spot(7)) + move for move in ([-9, -9], [9, -9], [9, 9], [-9, 9])]
    browser.press("$('lasso')")
    browser.mouse("mousePressed", *corners[0])
    for corner in (*corners[1:], corners[0] + 1):
        browser.mouse("mouseMoved", *corner)
    browser.mouse("mouseReleased", *corners[0])
    browser.until("!$('area').hidden")
    spots = browser.value("state.area.spots")
    assert 7 in spots
    assert len(spots) < 30
    browser.press("[...document.querySelectorAll('#area button')][0]")
    rows = [line.split(",") for line in browser.value("saved[1]").splitlines()]
    (row,) = [row for row in rows if row[1] == f'"{gene}"']
    assert float(row[2]) == pytest.approx(true[spots].mean(), abs=1e-3)
    browser.press("[...document.querySelectorAll('#area button')][1]")
    features = json.loads(browser.value("saved[1]"))["features"]
    assert [f["properties"]["objectType"] for f in features][:2] == ["annotation", "detection"]
    assert len(features) == 1 + len(spots)


def test_the_served_page_answers_clicks_and_keys(viewed: Viewed, address: str, tmp_path: Path):
    browser = Browser(tmp_path)
    try:
        browser.go(address)
        assert browser.value("panes[0].layer.kind") == "webgl"
        assert browser.value("panes[0].layer.spots") == 120
        gene = str(viewed.model.artifacts.genes[5])
        browser.key("/")
        browser.value("$('name-a').select()")
        browser.call("Input.insertText", text=gene)
        browser.key("Enter")
        browser.until(f"panes[0].heat && panes[0].heat.about.title === '{gene}'")
        true = viewed.slide(SLIDE).heat(gene, "measured").values
        np.testing.assert_array_equal(browser.value("[...panes[0].heat.values]"), true)
        the_drawn_pixels_are_the_values(browser, viewed, true)
        browser.value("document.activeElement.blur()")

        browser.click(*browser.spot(7))
        browser.until("state.spot === 7 && document.querySelectorAll('.near button').length === 12")
        told = browser.value("$('spot').textContent")
        assert viewed.slide(SLIDE).barcodes[7] in told
        assert all(gene in told for gene, _ in viewed.slide(SLIDE).spots([7])[0]["keywords"])
        browser.key("]")
        browser.until("panes[0].layer.segments > 10")
        assert browser.value("$('level-name').textContent") == viewed.model.levels[0]

        browser.key("b")
        browser.until("panes[1] && panes[1].heat && !$('compare').hidden")
        both = [viewed.slide(SLIDE).heat(gene, kind).values for kind in ("measured", "predicted")]
        r = float(re.search(r"r = (\S+)", browser.value("$('correlation').textContent"))[1])
        assert r == pytest.approx(np.corrcoef(*both)[0, 1], abs=0.005)

        an_area_is_drawn_and_downloaded(browser, gene, true)

        browser.press("document.querySelectorAll('.near button')[0]")
        browser.until(f"state.slide.id === '{OTHER}' && state.spot !== null")
        assert browser.value("location.hash").startswith(f"#slide={OTHER}")
        assert browser.complaints() == []
        late = """(async () => {
            const [plain, every] = [fetch, setInterval];
            const later = (ms, text) => new Promise((r) => setTimeout(r, ms, new Response(text)));
            const faked = { "data/x": [100, "{}"], "data/doing.json": [300, '["busy"]'] };
            fetch = (path, how) => faked[path] ? later(...faked[path]) : plain(path, how);
            setInterval = (work) => every(work, 20);
            try {
              await json("x");
              tell("other words");
              await later(500, "");
              return $("status").textContent;
            } finally { [fetch, setInterval] = [plain, every]; }
        })()"""
        assert browser.value(late) == "other words"
        browser.value("$('name-a').value = 'NO_SUCH_GENE'; $('form-a').requestSubmit()")
        browser.until("$('status').classList.contains('bad')")
        assert "no gene or gene set" in browser.value("$('status').textContent")
    finally:
        browser.close()


def test_the_exported_page_works_from_a_disk_without_webgl(viewed: Viewed, tmp_path: Path):
    gene, name = str(viewed.model.artifacts.genes[5]), viewed.model.database.names[2]
    index = export_page(viewed, tmp_path / "page", [gene, name])
    browser = Browser(tmp_path / "profile", "--disable-3d-apis")
    try:
        browser.go(f"{index.as_uri()}#slide={OTHER}&a={gene}&a-kind=predicted&spot=3&level=1")
        assert browser.value("panes[0].layer.kind") == "canvas"
        true = viewed.slide(OTHER).heat(gene, "predicted").values
        np.testing.assert_array_equal(browser.value("[...panes[0].heat.values]"), true)
        assert "reliability r" in browser.value("panes[0].legend.textContent")
        browser.until("document.querySelectorAll('.near button').length === 12")
        browser.press("$('region-area')")
        browser.until("!$('area').hidden")
        spots = browser.value("state.area.spots")
        answered = viewed.slide(OTHER).area(spots)
        column = answered["genes"]["name"].index(gene)
        text = browser.value(f"source.area('{OTHER}', state.area.spots)")
        for part in ("inside", "outside", "sd"):
            assert text["genes"][part][0] == pytest.approx(
                answered["genes"][part][column], rel=2e-3, abs=1e-5
            )
        painted = browser.value(
            """((c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width,
            c.height).data.buffer)).size)(panes[0].layerCanvas)"""
        )
        assert painted > 20  # colours: the spots are there
        browser.value("$('name-a').value = 'ELSE'; $('form-a').requestSubmit()")
        browser.until("$('status').classList.contains('bad')")
        assert "was not exported" in browser.value("$('status').textContent")
        assert browser.complaints() == []
    finally:
        browser.close()


@pytest.mark.skipif(not AXE, reason="name axe.min.js of npm's axe-core in HIBIO_AXE")
def test_nothing_bars_the_page_for_anybody(address: str, tmp_path: Path):
    browser = Browser(tmp_path)
    try:
        browser.go(f"{address}#slide={SLIDE}&two=1&level=1&spot=7")
        browser.until("document.querySelectorAll('.near button').length === 12")
        browser.press("$('region-area')")
        browser.until("!$('area').hidden")
        browser.call("Runtime.evaluate", expression=Path(AXE).read_text(encoding="utf-8"))
        for theme in ("light", "dark"):
            browser.value(f"document.documentElement.dataset.theme = '{theme}'")
            found = "axe.run().then((r) => r.violations.map((v) => v.id + v.nodes[0].html))"
            assert browser.value(found) == []
    finally:
        browser.close()
