"""Context patches: stored, read, checked and sealed like the patches of the spots themselves."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing import DataError, SlideStore, prepare
from preprocessing.patches import PatchConfig, read_patch
from preprocessing.slide_row import SlideRow
from preprocessing.slides import open_slide
from preprocessing.store import verify_store, write_store
from tests.preprocessing.sources import legacy_slide
from tests.preprocessing.test_store import SPOTS, make_table, smooth_patches

PATCH = PatchConfig(100.0, 16, 400.0)


def wide_patches() -> np.ndarray:
    return smooth_patches()[::-1, :, ::-1].copy()


def write(path: Path, encoding: str = "raw", **more: object) -> None:
    pictures = {"patches": smooth_patches(), "context": wide_patches()}
    order = np.random.default_rng(1).permutation(SPOTS)
    given: dict[str, object] = {
        name: [(int(i), values[i]) for i in order] for name, values in pictures.items()
    }
    given |= {"patch": PATCH, "encoding": encoding, **more}
    write_store(path, make_table(), SlideRow("S1", "P1", Path("c"), "visium"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_both_scales_come_back_in_any_order(tmp_path: Path, encoding: str):
    write(tmp_path / "S1.h5", encoding)
    limit = 0 if encoding == "raw" else 6
    with SlideStore(tmp_path / "S1.h5") as store:
        assert (store.context_um, store.n_context) == (400.0, SPOTS)
        for index in (list(range(SPOTS)), [6, 0, 3, 3, 1], []):
            for found, wanted in (
                (store.patches(index), smooth_patches()),
                (store.context(index), wide_patches()),
            ):
                difference = np.abs(found.astype(int) - wanted[index])
                assert difference.max(initial=0) <= limit
        with pytest.raises(DataError, match=r"there are 0..6"):
            store.context([SPOTS])
    (finding,) = verify_store(tmp_path / "S1.h5")
    assert "label column" in finding.message  # an empty one; nothing else is wrong


def test_a_store_without_context_is_what_it_was(tmp_path: Path):
    """Neither an attribute nor a group more: stores of earlier versions stay current."""
    write(tmp_path / "S1.h5", patch=PatchConfig(100.0, 16), context=None)
    with SlideStore(tmp_path / "S1.h5") as store:
        assert store.context_um is None
        assert store.n_context == 0
        assert "context_um" not in store.attrs
        with pytest.raises(DataError, match=r"no context patches.*--context-um"):
            store.context([0])
    with h5py.File(tmp_path / "S1.h5") as file:
        assert "context" not in file


def flip(file: h5py.File) -> None:
    data = file["context/bytes"]
    data[100] = data[100] ^ 1


def shorten(file: h5py.File) -> None:
    values = file["context/start"][:-1]
    del file["context/start"]
    file["context/start"] = values


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (flip, "context/bytes: not what was written"),
        (shorten, "context/start has shape (6,), expected (7,)"),
        (lambda file: file.__delitem__("context/size"), "context/size is missing"),
    ],
)
def test_damage_is_found(tmp_path: Path, edit, words: str):
    write(tmp_path / "S1.h5")
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        edit(file)
    told = [f.message for f in verify_store(tmp_path / "S1.h5") if f.level == "FAIL"]
    assert any(words in message for message in told), told


def test_damaged_jpegs_are_named(tmp_path: Path):
    write(tmp_path / "S1.h5", "jpeg")
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        file["context/bytes"][:] = 0
    with SlideStore(tmp_path / "S1.h5") as store:
        assert len(store.patches()) == SPOTS
        with pytest.raises(DataError, match=r"context: patch \d is damaged"):
            store.context()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": None}, "context_um is 400.0 and none are given"),
        ({"patch": PatchConfig(100.0, 16)}, "context_um is None and they are given"),
        ({"context": [(0, wide_patches()[0])]}, "context: 6 of 7 spots got no patch"),
        ({"context": [(0, wide_patches()[0][:8])]}, r"context: spot 0 has uint8 \(8, 16, 3\)"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, change, words: str):
    with pytest.raises(DataError, match=words):
        write(tmp_path / "S1.h5", **change)
    assert not (tmp_path / "S1.h5").exists()


@pytest.mark.parametrize("um", [100.0, 50.0, float("nan"), -1.0])
def test_a_context_is_wider_than_the_patch(um: float):
    with pytest.raises(DataError, match="must be wider than the patch"):
        PatchConfig(100.0, 16, um)


def test_prepare_cuts_the_context_around_the_same_spots(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    report = prepare([row], tmp_path / "out", patch=PatchConfig(200.0, 16, 600.0), images="raw")
    assert report.rows[0].status == "done", str(report)
    assert row.image is not None
    with SlideStore(tmp_path / "out" / "A1.h5") as store, open_slide(row.image) as slide:
        for i in (0, 13, 29):
            x, y = store.xy_px0[i]
            for um, found in ((200.0, store.patches([i])), (600.0, store.context([i]))):
                expected = read_patch(slide, (x, y), store.mpp, um, 16)
                np.testing.assert_array_equal(found[0], expected)
        assert np.abs(store.patches().astype(int) - store.context()).mean() > 5


def test_another_context_prepares_again_and_none_keeps_old_stores(tmp_path: Path):
    row, _ = legacy_slide(tmp_path)
    plain = PatchConfig(200.0, 16)
    wide, wider = replace(plain, context_um=400.0), replace(plain, context_um=800.0)

    def status(patch: PatchConfig) -> str:
        return prepare([row], tmp_path / "out", patch=patch).rows[0].status

    assert [status(p) for p in (plain, plain, wide, wide, wider)] == [
        "done",
        "skipped",
        "done",
        "skipped",
        "done",
    ]
    assert status(plain) == "done"
    with h5py.File(tmp_path / "out" / "A1.h5") as file:  # as before there was a context
        settings = json.loads(file.attrs["settings"])
    assert settings["patch"] == {"patch_um": 200.0, "patch_px": 16}
    assert asdict(plain)["context_um"] is None


def test_without_an_image_there_is_no_context(tmp_path: Path):
    row, _ = legacy_slide(tmp_path, image=False)
    prepare([row], tmp_path / "out", patch=PatchConfig(200.0, 16, 600.0))
    with SlideStore(tmp_path / "out" / "A1.h5") as store:
        assert not store.has_image
        assert store.context_um is None
