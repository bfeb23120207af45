"""Runs that are killed, run at once, or out of disk: only whole stores, and the same ones."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing import DataError, SlideStore, prepare, stores_in
from preprocessing.files import atomic_path, remove_abandoned
from preprocessing.hdf5 import Sink, hdf5_writer
from preprocessing.manifest import write_manifest
from preprocessing.store import verify_store
from preprocessing.store.read import patch_places, read_patches
from tests.preprocessing.killed_run import PATCH, POINTS
from tests.preprocessing.same_store import assert_same_store
from tests.preprocessing.sources import legacy_slide

ROOT = Path(__file__).resolve().parents[2]
SLIDES = ("A1", "B1")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with m.csv, its sources, and whole/ with the stores of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = [legacy_slide(folder, name, 12, 12)[0] for name in SLIDES]
    write_manifest(rows, folder / "m.csv")
    assert not prepare(folder / "m.csv", folder / "whole", patch=PATCH).failed
    return folder


def start(
    cohort: Path, out: Path, point: str = "none", nth: int = 1, workers: int = 0, limit: int = 0
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.preprocessing.killed_run"]
    command += [str(cohort / "m.csv"), str(out), point, str(nth), str(workers)]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limited if limit else None,
    )


def continues(cohort: Path, out: Path) -> None:
    """What is there is whole; running again gives the stores of an uninterrupted run."""
    for path in sorted(out.glob("[!.]*.h5")):
        assert_same_store(path, cohort / "whole" / path.name)
    report = prepare(cohort / "m.csv", out, patch=PATCH)
    assert not report.failed, str(report)
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.h5" for name in SLIDES]
    for path in stores_in(out):
        assert_same_store(path, cohort / "whole" / path.name)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(cohort: Path, tmp_path: Path, point: str) -> None:
    nth = 1 + POINTS.index(point) % 2  # at the first slide or at the second
    process = start(cohort, tmp_path / "out", point, nth)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert len(left) == (point != "renamed")  # half a file has no store's name
    continues(cohort, tmp_path / "out")


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment(cohort: Path, tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    process = start(cohort, out, workers=seed % 2)
    limit = time.monotonic() + 60
    while not out.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(np.random.default_rng(seed).uniform(0, 1.2))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    continues(cohort, out)


def test_two_runs_into_one_folder(cohort: Path, tmp_path: Path) -> None:
    both = [start(cohort, tmp_path / "out", workers=n) for n in (0, 1)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    continues(cohort, tmp_path / "out")


def test_a_full_disk_is_reported(cohort: Path, tmp_path: Path) -> None:
    """The system refuses to write more than 60 kB a file; HDF5 alone would crash of it."""
    process = start(cohort, tmp_path / "out", limit=60_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []


def refuse(after: int, error: BaseException) -> Callable[[Sink, memoryview], None]:
    real = Sink._store

    def store(self: Sink, view: memoryview) -> None:
        if self.tell() + len(view) > after:
            raise error
        real(self, view)

    return store


@pytest.mark.parametrize("after", [0, 3_000, 40_000])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError(5, "it is broken"), KeyboardInterrupt()],
    ids=["full", "broken", "stopped"],
)
def test_a_write_that_is_refused(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    monkeypatch.setattr(Sink, "_store", refuse(after, error))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            prepare(cohort / "m.csv", tmp_path / "out", patch=PATCH)
    else:
        report = prepare(cohort / "m.csv", tmp_path / "out", patch=PATCH)
        assert [r.status for r in report.rows] == ["failed", "failed"]
        for words in ("the disk is full", "MiB are free"):
            assert (words in report.rows[0].reason) == (error.errno == 28)
        assert ("it is broken" in report.rows[0].reason) == (error.errno == 5)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_sink_reads_back_what_it_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sink, "_store", refuse(10, OSError(28, "full")))
    with Sink(tmp_path / "a") as sink:
        sink.write(b"0123456789")
        sink.write(b"abcdef")
        sink.seek(8)
        sink.write(b"XYZ")
        sink.seek(6)
        found = bytearray(12)
        sink.readinto(found)
        assert bytes(found) == b"67XYZbcdef\0\0"
        assert sink.seek(0, 2) == 16
        with pytest.raises(OSError, match="full"):
            sink.check()


def test_hdf5_through_the_sink_is_ordinary(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (300, 70))
    with hdf5_writer(tmp_path / "a.h5") as (file, sink):
        file.create_dataset("x", data=values, chunks=(7, 70), compression="gzip")
        file.attrs["name"] = "value"
        sink.check()
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["x"][:], values)
        assert file.attrs["name"] == "value"


def test_only_abandoned_files_of_ours_are_removed(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "A1.h5") as mine:
        mine.write_bytes(b"in work")
        host = mine.name.split(".")[2].split("-")[0]
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        dead = ended.pid
        rest = "0123456789abcdef.part.h5"
        names = {
            "gone": f".A1.{host}-{dead}-{rest}",
            "elsewhere": f".A1.00000000-{dead}-{rest}",
            "elsewhere, long ago": f".B1.00000000-{dead}-{rest}",
            "older version, long ago": f".B1.{'a' * 32}.part.h5",
            "older version": f".C1.{'a' * 32}.part.h5",
            "another's": ".A1.swp",
            "another's, long ago": ".notes.part",
            "store": "B1.h5",
        }
        for what, name in names.items():
            (tmp_path / name).write_bytes(b"")
            if "long ago" in what:
                os.utime(tmp_path / name, (1e9, 1e9))
        folder = names["gone"].replace("part.h5", "part.zarr.old")  # put aside, and not yet gone
        (tmp_path / folder / "X").mkdir(parents=True)
        removed = {p.name for p in remove_abandoned(tmp_path)}
        assert not (tmp_path / folder).exists()
        assert removed == {
            names[what] for what in ("gone", "elsewhere, long ago", "older version, long ago")
        } | {folder}
        assert mine.exists()
    assert remove_abandoned(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("patches/bytes", 5000, "patches/bytes"),
        ("counts/data", 3, "counts/data"),
        ("spots/xy_um", (3, 1), "spots/xy_um"),
        ("thumbnail", 100, "thumbnail"),
        ("features/handcrafted", (2, 2), "features/handcrafted"),
    ],
)
def test_check_finds_one_changed_value(
    cohort: Path, tmp_path: Path, name: str, place: int | tuple[int, int], words: str
) -> None:
    copy = tmp_path / "A1.h5"
    copy.write_bytes((cohort / "whole" / "A1.h5").read_bytes())
    assert "FAIL" not in {f.level for f in verify_store(copy)}
    with h5py.File(copy, "r+") as file:
        file[name][place] += 1
    found = [f.message for f in verify_store(copy) if f.level == "FAIL"]
    assert any(f"{words}: not what was written" in message for message in found), found


def test_check_covers_attributes_and_the_list_of_contents(cohort: Path, tmp_path: Path) -> None:
    def edited(edit: Callable[[h5py.File], object]) -> str:
        copy = tmp_path / "A1.h5"
        copy.write_bytes((cohort / "whole" / "A1.h5").read_bytes())
        with h5py.File(copy, "r+") as file:
            edit(file)
        return " ".join(f"{f.level} {f.message}" for f in verify_store(copy))

    assert "attributes or the list of contents" in edited(lambda f: f.attrs.update({"mpp": 5.1}))
    assert "attributes or the list" in edited(lambda f: f.__delitem__("thumbnail"))
    assert "attributes or the list" in edited(lambda f: f.create_dataset("more", data=[1]))
    assert "FAIL" not in edited(lambda f: f.create_dataset("features/new", data=np.zeros((144, 2))))
    assert "WARN no checksum" in edited(lambda f: f.attrs.__delitem__("content_sha256"))
    assert "features/huge claims" in edited(
        lambda f: f.create_dataset("features/huge", (10**9, 10**6), "f2", chunks=(1000, 1000))
    )


def test_raw_patches_are_gathered_from_the_file(cohort: Path, tmp_path: Path) -> None:
    """Raw patches, in one piece, equal those that the slow way through HDF5 gives."""
    assert not prepare(cohort / "m.csv", tmp_path, patch=PATCH, images="raw").failed
    index = np.array([7, 3, 3, 0, 143, 8, 9])
    with SlideStore(tmp_path / "A1.h5") as store, h5py.File(tmp_path / "A1.h5") as file:
        places = patch_places(file)
        assert places.mapped is not None
        slow = read_patches(file, places._replace(mapped=None), index)
        np.testing.assert_array_equal(store.patches(index), slow)
        assert store.patches([]).shape == (0, 32, 32, 3)
        np.testing.assert_array_equal(store.patches()[index], slow)
        patches = store.patches(index)
        patches[:] = 0  # a copy: neither the file nor the next call sees it
        np.testing.assert_array_equal(store.patches(index), slow)
    with pytest.raises((DataError, ValueError)):
        store.patches([0])  # closed
