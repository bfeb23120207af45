"""Slides in processes: crashes, hangs and kills cost one slide; interruptions leave no process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing import prepare, stores_in
from preprocessing import workers as slide_workers
from preprocessing.patches import PatchConfig
from preprocessing.run.preparation import attempt_slide
from preprocessing.run.sifting import SlideTask
from preprocessing.workers import Lost, in_processes, interruptible
from tests.preprocessing import faulty
from tests.preprocessing.sources import legacy_slide

PATCH = PatchConfig(200.0, 16)
ROOT = Path(__file__).resolve().parents[2]


def tasks(folder: Path, *names: str) -> dict[str, SlideTask]:
    row, _ = legacy_slide(folder, "A1", image=False)
    rows = [replace(row, slide_id=name) for name in names]
    out = folder / "out"
    return {row.slide_id: SlideTask(row, out / f"{row.slide_id}.h5", PATCH) for row in rows}


def children() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


def test_crash_hang_and_kill_cost_one_slide_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slide_workers, "_GRACE_S", 0.3)
    jobs = tasks(tmp_path, "crash", "A1", "hang", "B1", "kill", "leave", "C1")
    found = dict(in_processes(faulty.attempt, jobs, 2, 12.0))
    assert len(found) == 7
    assert {n for n, r in found.items() if not isinstance(r, Lost)} == {"A1", "B1", "C1"}
    assert {found[name].status for name in ("A1", "B1", "C1")} == {"done"}
    assert "a library crashed (SIGSEGV)" in found["crash"].reason
    assert "no result after 0.2" in found["hang"].reason
    assert "ended from outside (signal 9)" in found["kill"].reason
    assert "exit code 3" in found["leave"].reason
    assert [p.stem for p in stores_in(tmp_path / "out")] == ["A1", "B1", "C1"]


def test_one_process_is_enough_and_leaves_with_the_last_slide(tmp_path: Path) -> None:
    before = children()
    found = in_processes(attempt_slide, tasks(tmp_path, "A1", "B1"), 1, 1e300)
    assert [(name, r.status) for name, r in found] == [("A1", "done"), ("B1", "done")]
    assert children() - before == set()


def test_stopping_early_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_workers, "_GRACE_S", 0.3)
    before = children()
    results = in_processes(faulty.attempt, tasks(tmp_path, "A1", "hang", "B1"), 2, 60.0)
    assert next(results)[0] == "A1"
    results.close()
    assert children() - before == set()


def test_a_stop_that_falls_into_a_finaliser_ends_a_process_all_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = dict(in_processes(faulty.attempt, tasks(tmp_path, "finaliser", "A1"), 1, 60.0))
    lost = found["finaliser"]
    assert isinstance(lost, Lost)
    assert "ended from outside (signal 15)" in lost.reason
    assert lost.seconds < 30
    assert not isinstance(found["A1"], Lost)
    assert "Exception ignored" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stop", "then_s"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 5.0),
        (faulty.stop_in_finaliser, 5.0),
        (faulty.stop_in_finaliser, 0.0),  # the last of the block: what is sent must not kill us
    ],
)
def test_sigterm_is_an_interrupt_inside_and_not_outside(
    stop: Callable[[], None], then_s: float
) -> None:
    before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook

    def send() -> None:
        with interruptible():
            stop()
            time.sleep(then_s)

    with pytest.raises(KeyboardInterrupt):
        send()
    assert signal.getsignal(signal.SIGTERM) == before
    assert sys.unraisablehook is hook
    thread = threading.Thread(target=lambda: interruptible().__enter__())
    thread.start()  # signals belong to the main thread: nothing happens
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_so_and_can_be_continued(tmp_path: Path, number: int) -> None:
    from preprocessing.manifest import write_manifest

    rows = [legacy_slide(tmp_path, f"S{i}", 14, 14)[0] for i in range(6)]
    write_manifest(rows, tmp_path / "m.csv")
    out = tmp_path / "out"
    code = (
        "import sys; from preprocessing.run import prepare; from preprocessing.patches import "
        "PatchConfig; from hibio.cli.command import guarded; "
        f"sys.exit(guarded(lambda: prepare({str(tmp_path / 'm.csv')!r}, {str(out)!r}, "
        "patch=PatchConfig(200.0, 64), workers=1) and 0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while not list(out.glob("S*.h5")) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "stopped; whatever was finished is on disk" in errors
    assert "Traceback" not in errors
    assert list(out.glob(".*")) == []
    report = prepare(tmp_path / "m.csv", out, patch=PatchConfig(200.0, 64))
    assert not report.failed
    assert report.rows[0].status == "skipped"
