"""OME-Zarr pictures of every version and order of axes: right colours, places and scale."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.run.preparation import prepare_slide
from preprocessing.run.sifting import SlideTask
from preprocessing.slides import open_slide
from preprocessing.store import SlideStore
from tests.preprocessing.sources import legacy_slide, zarr_group

zarr = pytest.importorskip("zarr", reason="zarr (extra spatialdata) is not installed")


def picture(height=90, width=110):
    y, x = np.mgrid[:height, :width]
    return np.dstack([x * 2, y * 2, np.full_like(x, 77)]).astype(np.uint8)


def write(folder, true, axes="cyx", version="0.4", unit="micrometer", labels=("r", "g", "b")):
    """Two levels; 0.5 um a pixel along x and y."""
    form = 3 if version == "0.5" else 2
    group = zarr_group(folder, form)
    for level in (0, 1):
        part = true[:: 2**level, :: 2**level]
        data = np.expand_dims(part.transpose(["yxc".index(a) for a in axes if a in "yxc"]), 0)
        data = data[0] if len(axes) == 3 else data[:, :, None]  # t c z y x
        create = getattr(group, "create_array", None) or group.create_dataset
        store = create(str(level), shape=data.shape, dtype=data.dtype, chunks=_chunks(data))
        store[...] = data
    steps = [[0.5 * 2**n if a in "yx" else 1.0 for a in axes] for n in (0, 1)]
    scales = {
        "version": version,
        "axes": [{"name": a} | ({"unit": unit} if unit and a in "yx" else {}) for a in axes],
        "datasets": [
            {"path": str(n), "coordinateTransformations": [{"type": "scale", "scale": s}]}
            for n, s in enumerate(steps)
        ],
    }
    about = {"multiscales": [scales], "omero": {"channels": [{"label": name} for name in labels]}}
    group.attrs.update({"ome": about} if form == 3 else about)
    return folder


def _chunks(data):
    return tuple(min(n, 32) for n in data.shape)


@pytest.mark.parametrize("axes", ["cyx", "yxc", "tczyx"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_pixels_levels_and_scale(tmp_path, axes, version):
    true = picture()
    with open_slide(write(tmp_path / "a.zarr", true, axes, version)) as slide:
        assert slide.level_dimensions == ((110, 90), (55, 45))
        assert slide.level_downsamples == (1.0, 2.0)
        assert slide.mpp == 0.5
        found = slide.read_region((-3, 5), 0, (80, 70))
        half = slide.read_region((20, 30), 1, (30, 20))
    assert np.array_equal(found[:, 3:], true[5:75, :77])
    assert (found[:, :3] == 255).all()
    assert np.array_equal(half, true[::2, ::2][15:35, 10:40])


@pytest.mark.parametrize(("unit", "mpp"), [("millimeter", 500.0), (None, None), ("unit", None)])
def test_only_lengths_are_a_scale(tmp_path, unit, mpp):
    with open_slide(write(tmp_path / "a.zarr", picture(), unit=unit)) as slide:
        assert slide.mpp == (mpp if mpp and mpp < 20 else None)


def test_deep_grey_and_further_channels(tmp_path):
    true = picture()
    true[0, 0] = 255
    deep = write(tmp_path / "deep.zarr", true.astype(np.uint16) * 16 + 15)  # 12 bits
    grey = write(tmp_path / "grey.zarr", true[..., :1], labels=["HE"])
    four = write(tmp_path / "four.zarr", np.dstack([true, true[..., 0]]), labels=())
    size = (110, 90)
    with open_slide(deep) as slide:
        assert np.abs(slide.read_region((0, 0), 0, size).astype(int) - true).max() <= 1
        assert "12 are in use" in slide.notes[0]
    with open_slide(grey) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, size), true[..., [0, 0, 0]])
    with open_slide(four) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, size), true)
        assert "fourth channel" in slide.notes[0]


def test_the_largest_of_several_is_read(tmp_path):
    zarr_group(tmp_path / "a.zarr")
    write(tmp_path / "a.zarr/0", picture(20, 30))
    write(tmp_path / "a.zarr/1", picture())
    with open_slide(tmp_path / "a.zarr") as slide:
        assert slide.level_dimensions[0] == (110, 90)


def test_what_is_no_stained_section_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"DAPI.*expected red, green and blue"):
        open_slide(write(tmp_path / "a.zarr", picture(), labels=("DAPI", "CD3", "CD8")))
    with pytest.raises(DataError, match=r"without names.*expected red"):
        open_slide(write(tmp_path / "b.zarr", picture().astype(np.float32), labels=()))
    zarr_group(tmp_path / "c.zarr")
    with pytest.raises(DataError, match="without OME multiscales"):
        open_slide(tmp_path / "c.zarr")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match="no such image file"):
        open_slide(tmp_path / "plain")


def test_pickles_damage_and_a_missing_library_are_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "a.zarr", picture())
    about = json.loads((folder / "0/.zarray").read_text())
    (folder / "0/.zarray").write_text(json.dumps(about | {"filters": [{"id": "pickle"}]}))
    with pytest.raises(DataError, match="pickled objects"):
        open_slide(folder)
    folder = write(tmp_path / "b.zarr", picture())
    for chunk in (folder / "0").glob("0*"):
        for file in [chunk] if chunk.is_file() else chunk.rglob("*"):
            if file.is_file():
                file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="damaged"):
        open_slide(folder)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(DataError, match=r"needs zarr: pip install .hibio\[spatialdata"):
        open_slide(folder)


def test_a_slide_is_prepared_from_it_as_from_a_file(tmp_path):
    row, _ = legacy_slide(tmp_path)
    with open_slide(row.image) as slide:
        whole = slide.read_region((0, 0), 0, slide.level_dimensions[0])
    folder = write(tmp_path / "he.zarr", whole, unit=None)
    kept = []
    for name, image in (("a", row.image), ("b", folder)):
        task = SlideTask(
            replace(row, slide_id=name, image=image),
            tmp_path / f"{name}.h5",
            PatchConfig(100.0, 20),
            images="raw",
        )
        assert [prepare_slide(task).status for _ in range(2)] == ["done", "skipped"]
        with SlideStore(task.store) as store:
            kept.append(store.patches(range(store.n_spots)))
    assert np.array_equal(*kept)
