"""The page of `hibio view` in a real browser: clicks, keys, areas, two slides, no WebGL, no server.

Chromium is driven over a pair of pipes (DevTools protocol); skipped where it is not installed.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.view import page
from eval.view.cohort import Cohort as Viewed
from eval.view.export import export_page
from eval.view.server import application
from tests.eval.image_cohort import Cohort

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SLIDE, OTHER = "sim001", "sim002"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with"),
    pytest.mark.skipif(
        not (page.VENDOR / page.SCRIPT).is_file(),
        reason="no OpenSeadragon in this checkout: `make view-assets`",
    ),
]


class Browser:
    """Headless Chromium with one page."""

    def __init__(self, profile: Path, *flags: str) -> None:
        ours, theirs = [os.pipe() for _ in range(2)], []
        for own in (ours[0][0], ours[1][1]):
            theirs.append(fcntl.fcntl(own, fcntl.F_DUPFD, 10))
        switches = [
            "--headless",
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--disable-gpu-sandbox",
        ]
        switches += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run"]
        switches += ["--disable-dev-shm-usage", "--window-size=1300,900"]
        actions = [(os.POSIX_SPAWN_DUP2, theirs[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_WRONLY, 0) for n in (1, 2)]
        line = [CHROMIUM, *switches, f"--user-data-dir={profile}", *flags, "about:blank"]
        self.process = os.posix_spawn(CHROMIUM, line, os.environ, file_actions=actions, setpgroup=0)
        for end in (ours[0][0], ours[1][1], *theirs):
            os.close(end)
        self.to, self.back = os.fdopen(ours[0][1], "wb", 0), os.fdopen(ours[1][0], "rb", 0)
        self.number, self.rest, self.events = 0, b"", []
        (target,) = [
            one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        ]
        self.session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        if method.partition(".")[0] != "Target":
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += self.back.read(1 << 16)
            one, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("$('status').textContent"))
            time.sleep(0.05)

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def key(self, text: str) -> None:
        for kind in ("keyDown", "keyUp"):
            given = {"text": "\r" if text == "Enter" else text} if kind == "keyDown" else {}
            code = {"windowsVirtualKeyCode": 13} if text == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=text, **given, **code)

    def mouse(self, kind: str, x: float, y: float) -> None:
        given = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", **given, buttons=int(kind != "mouseReleased"))

    def click(self, x: float, y: float) -> None:
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def press(self, element: str) -> None:
        """Click in the middle of an element."""
        box = f"(b => [b.x + b.width / 2, b.y + b.height / 2])({element}.getBoundingClientRect())"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        self.click(*self.value(box))

    def spot(self, number: int, pane: int = 0) -> tuple[float, float]:
        """Where a spot is on the screen."""
        x, y = self.value(
            f"""(([x, y, k], xy, box) => [box.x + x + k * xy[{2 * number}],
            box.y + y + k * xy[{2 * number + 1}]])(panes[{pane}].view(), state.slide.xy,
            panes[{pane}].top.getBoundingClientRect())"""
        )
        return x, y

    def complaints(self) -> list[str]:
        """Errors of the page, and requests that went to another machine."""
        found = []
        for event in self.events:
            given = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            if event.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
                found.append(given["entry"]["text"])
            if event.get("method") == "Network.requestWillBeSent":
                url = given["request"]["url"]
                if not re.match(r"http://127\.0\.0\.1:|file://|data:|blob:|about:", url):
                    found.append(url)
        return found

    def close(self) -> None:
        os.killpg(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)
        self.to.close()
        self.back.close()


@pytest.fixture(scope="module")
def viewed(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    copy = tmp_path_factory.mktemp("browser") / "checkpoint"
    shutil.copytree(cohort.checkpoint, copy)
    slides = cohort.stores.parent / "cohort" / "slides"
    return Viewed(copy, cohort.stores, slides=slides, sets="default", only=[SLIDE, OTHER])


@pytest.fixture(scope="module")
def address(viewed: Viewed) -> Iterator[str]:
    """Where the page is served."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs hibio[view]")
    server = uvicorn.Server(uvicorn.Config(application(viewed), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


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
        assert browser.value("document.querySelectorAll('.near button').length") == 12
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
