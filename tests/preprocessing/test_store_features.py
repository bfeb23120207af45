"""Adding features to a store: read back, refused, never half done, nothing of others lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing.errors import DataError
from preprocessing.store import SlideStore, file_sha256, verify_store
from preprocessing.store import layout as store_layout
from preprocessing.store import write as store_features
from preprocessing.store.read import stores_in
from preprocessing.store.write import add_features, feature_origin
from tests.preprocessing.full_disk import on_a_full_disk

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = {"encoder": "a", "weights_sha256": "0" * 64, "mean": [0.1, 0.2, 0.3], "input_px": 224}


@pytest.fixture
def store(toy_stores, tmp_path) -> Path:
    return Path(shutil.copyfile(stores_in(toy_stores)[0], tmp_path / "sim001.h5"))


def values(path: Path, width: int = 5, seed: int = 0) -> np.ndarray:
    with SlideStore(path) as opened:
        spots = opened.n_spots
    return np.random.default_rng(seed).normal(size=(spots, width)).astype(np.float32)


def test_features_and_their_origin_are_read_back(store):
    with SlideStore(store) as before:
        counts, names = before.counts(), before.feature_names
    features = values(store)
    add_features(store, "a", features, ORIGIN)
    with SlideStore(store) as after:
        assert after.feature_names == sorted([*names, "a"])
        np.testing.assert_array_equal(after.features("a"), features.astype(np.float16))
        assert (after.counts() != counts).nnz == 0
    with h5py.File(store) as file:
        assert file["features/a"].dtype == np.float16
    assert feature_origin(store, "a") == ORIGIN
    assert feature_origin(store, "b") is None
    assert feature_origin(store, "handcrafted") == {}
    assert all(finding.level != "FAIL" for finding in verify_store(store))
    assert [path.name for path in store.parent.iterdir()] == ["sim001.h5"]


def test_features_of_the_same_name_are_replaced(store):
    add_features(store, "a", values(store), ORIGIN)
    other = values(store, width=3, seed=1)
    add_features(store, "a", other)
    with SlideStore(store) as after:
        np.testing.assert_array_equal(after.features("a"), other.astype(np.float16))
    assert feature_origin(store, "a") == {}


def test_an_open_reader_keeps_what_it_opened(store):
    with SlideStore(store) as reader:
        add_features(store, "a", values(store))
        assert "a" not in reader.feature_names
        assert reader.patches([0]).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("patches", lambda v: v, "means the patches themselves"),
        ("a/b", lambda v: v, "not a plain name"),
        (".a", lambda v: v, "not a plain name"),
        ("..", lambda v: v, "not a plain name"),
        ("a\\b", lambda v: v, "not a plain name"),
        ("a\0", lambda v: v, "not a plain name"),
        ("", lambda v: v, "not a plain name"),
        ("x" * 129, lambda v: v, "not a plain name"),
        ("a", lambda v: v[:-1], "rows of features for"),
        ("a", lambda v: v * np.inf, "all finite"),
        ("a", lambda v: v[:, 0], "must be"),
    ],
)
def test_what_is_refused_leaves_the_store_as_it_was(store, name, change, words):
    before = file_sha256(store)
    with pytest.raises(DataError, match=words):
        add_features(store, name, change(values(store)))
    assert file_sha256(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["sim001.h5"]


def test_no_store_is_refused(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"no store")
    with pytest.raises(DataError, match="not a complete HDF5 file"):
        add_features(tmp_path / "a.h5", "a", np.zeros((3, 2)))


def test_an_error_while_writing_leaves_the_old_store(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    features, before = values(store), file_sha256(store)
    monkeypatch.setattr(store_layout, "write_features", full)
    with pytest.raises(OSError, match="No space"):
        add_features(store, "a", features)
    assert file_sha256(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["sim001.h5"]


ADD = """
import numpy as np
from preprocessing.store import SlideStore
from preprocessing.store.write import add_features
path = sys.argv[1]
with SlideStore(path) as store:
    spots = store.n_spots
attempt(lambda: add_features(path, "a", np.ones((spots, 4096))))
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("more", [-50, 3_000, 200_000], ids=["copying", "opening", "writing"])
def test_a_full_disk_is_an_error_and_no_crash(store, more):
    """HDF5 alone would kill the process; the store stays as it was."""
    before, size = file_sha256(store), store.stat().st_size
    told = on_a_full_disk(ADD, store, limit=size + more)
    assert "File too large" in told
    if more > 0:
        assert "MiB are free: make room and run again" in told
        assert str(store.parent) in told
    assert file_sha256(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["sim001.h5"]


def test_added_features_have_a_checksum_that_check_compares(store):
    def found():
        return {(f.level, f.message) for f in verify_store(store) if "features" in f.message}

    add_features(store, "a", values(store))
    assert found() == set()
    with h5py.File(store, "r+") as file:
        file["features/a"][3, 2] += 1
    ((level, message),) = found()
    assert (level, message.split(":")[0]) == ("FAIL", "features/a")
    add_features(store, "a", values(store))
    assert found() == set()
    with h5py.File(store, "r+") as file:
        del file["features/a"].attrs["sha256"]
    ((level, message),) = found()
    assert (level, message.split(" (")[0]) == ("WARN", "features/a: no checksum")


def test_features_that_another_run_adds_meanwhile_are_not_lost(store, monkeypatch):
    """The other run exchanges the store after this one has copied it."""
    copy, mine, theirs = shutil.copyfile, values(store), values(store, seed=2)

    def copy_then_other(source, target):
        done = copy(source, target)
        monkeypatch.setattr(store_features.shutil, "copyfile", copy)
        add_features(store, "theirs", theirs)
        return done

    monkeypatch.setattr(store_features.shutil, "copyfile", copy_then_other)
    add_features(store, "mine", mine)
    with SlideStore(store) as after:
        np.testing.assert_array_equal(after.features("mine"), mine.astype(np.float16))
        np.testing.assert_array_equal(after.features("theirs"), theirs.astype(np.float16))


WRITER = """
import sys
import numpy as np
from preprocessing.store import SlideStore
from preprocessing.store.write import add_features
path = sys.argv[1]
spots = SlideStore(path).n_spots
print("ready", flush=True)
for turn in range(10000):
    add_features(path, "a", np.full((spots, 512), turn % 100), {"turn": turn})
    print(turn, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_process_killed_at_any_moment_leaves_a_whole_store(store):
    for turn in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store)], cwd=ROOT, stdout=subprocess.PIPE
        )
        for _ in range(1 + turn % 3):
            assert writer.stdout.readline()
        time.sleep(0.0037 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert stores_in(store.parent) == [store]
        with SlideStore(store) as left:
            if "a" in left.feature_names:
                assert len(np.unique(left.features("a"))) == 1
            assert left.counts().nnz > 0
        assert all(finding.level != "FAIL" for finding in verify_store(store))
    with SlideStore(store) as left:
        assert "a" in left.feature_names
