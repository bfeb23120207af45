"""Headless Chromium, driven over a pair of pipes (the DevTools protocol), and a page for it."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.view.cohort import Cohort
from eval.view.server import application

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""


@contextmanager
def served(cohort: Cohort) -> Iterator[str]:
    """Where the page of a cohort is served meanwhile."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application(cohort), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


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
