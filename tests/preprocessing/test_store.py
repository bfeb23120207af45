"""The slide store: what is written is read back, other tools read it, damage is named."""

import hashlib
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from preprocessing import DataError, SlideStore, SpotTable, stores_in
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.store import SlidePicture, verify_store, write_store
from preprocessing.store.write import add_features

PATCH = PatchConfig(100.0, 16)
SPOTS = 7


def make_table(spots: int = SPOTS, genes: int = 400) -> SpotTable:
    rng = np.random.default_rng(0)
    xy = rng.random((spots, 2)) * 90 + 5
    labels = {"domain": ["a", "", "é", "a", "b", "a", "b"], "a/b": np.arange(7) / 3, "..": [""] * 7}
    return SpotTable(
        counts=csr_matrix(rng.poisson(2.0, (spots, genes))),
        gene_ids=np.array([f"ENSG{g}" for g in range(genes)]),
        gene_names=np.array([f"G{g}" for g in range(genes)]),
        barcodes=np.array([f"s{i}" for i in range(spots)]),
        xy_px0=xy,
        xy_um=xy * 2.0,
        mpp=2.0,
        labels=pd.DataFrame(labels),
        notes=("one note",),
    )


def smooth_patches(spots: int = SPOTS) -> np.ndarray:
    """Smooth pictures, which JPEG keeps nearly unchanged, uint8 (S, 16, 16, 3)."""
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    return np.stack(
        [
            np.stack([120 + 5 * x, 100 + 4 * y, np.full_like(x, 25 * i)], axis=2)
            for i in range(spots)
        ]
    ).astype(np.uint8)


def write(path: Path, *, image: bool = True, encoding: str = "jpeg", **more: object) -> SpotTable:
    table = make_table()
    order = np.random.default_rng(1).permutation(SPOTS)
    patches = smooth_patches()
    given: dict[str, object] = {
        "patches": ((int(i), patches[i]) for i in order) if image else None,
        "patch": PATCH,
        "features": {"handcrafted": np.arange(SPOTS * 2).reshape(SPOTS, 2) / 2} if image else {},
        "tissue_fraction": np.linspace(0.1, 1, SPOTS) if image else None,
        "source_sha256": {"counts": "ab"},
        "encoding": encoding,
        "picture": SlidePicture((100, 100), patches[0], 100 / 16) if image else None,
        "dropped": {"zero counts": 3},
    }
    write_store(path, table, SlideRow("S1", "P1", Path("c"), "visium"), **(given | more))  # type: ignore[arg-type]
    return table


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_everything_comes_back(tmp_path: Path, encoding: str):
    table = write(tmp_path / "S1.h5", encoding=encoding)
    with SlideStore(tmp_path / "S1.h5") as store:
        assert (store.slide_id, store.patient_id, store.n_spots) == ("S1", "P1", SPOTS)
        assert store.mpp == 2.0
        assert store.has_image
        assert (store.counts() != table.counts).nnz == 0
        assert store.counts().dtype == np.int32
        for name in ("gene_ids", "gene_names", "barcodes"):
            assert getattr(store, name).tolist() == getattr(table, name).tolist()
        np.testing.assert_array_equal(store.xy_um, table.xy_um)
        np.testing.assert_array_equal(store.xy_px0, table.xy_px0)
        pd.testing.assert_frame_equal(store.labels(), table.labels)
        np.testing.assert_allclose(store.tissue_fraction, np.linspace(0.1, 1, SPOTS), rtol=1e-6)
        assert store.attrs["dropped"] == {"zero counts": 3}
        assert store.attrs["source_sha256"] == {"counts": "ab"}
        assert store.attrs["notes"] == ["one note"]
        difference = np.abs(store.patches().astype(int) - smooth_patches())
        assert difference.max() <= (0 if encoding == "raw" else 6)
        assert store.thumbnail is not None
        assert store.thumbnail.shape == (16, 16, 3)
        assert store.thumbnail_downsample == 6.25
        assert store.sha256 == hashlib.sha256((tmp_path / "S1.h5").read_bytes()).hexdigest()


def test_patches_by_number_in_any_order_with_repeats(tmp_path: Path):
    write(tmp_path / "S1.h5", encoding="raw")
    with SlideStore(tmp_path / "S1.h5") as store:
        for index in ([3], [6, 0, 3, 3, 1], [], list(range(SPOTS))):
            np.testing.assert_array_equal(store.patches(index), smooth_patches()[index])
        for bad in ([-1], [0, SPOTS]):
            with pytest.raises(DataError, match=r"there are 0..6"):
                store.patches(bad)


def test_anndata_reads_the_counts_and_the_names(tmp_path: Path):
    table = write(tmp_path / "S1.h5")
    with h5py.File(tmp_path / "S1.h5") as file:
        counts = anndata.io.read_elem(file["counts"])
        names = anndata.io.read_elem(file["genes/name"])
    assert (counts != table.counts).nnz == 0
    assert list(names) == table.gene_names.tolist()


def test_counts_only(tmp_path: Path):
    write(tmp_path / "S1.h5", image=False)
    with SlideStore(tmp_path / "S1.h5") as store:
        assert not store.has_image
        assert store.feature_names == []
        assert store.thumbnail is None
        assert store.thumbnail_downsample is None
        assert np.isnan(store.tissue_fraction).all()
        with pytest.raises(DataError, match="counts only"):
            store.patches([0])
    assert [f.level for f in verify_store(tmp_path / "S1.h5")] == ["WARN", "WARN"]


def test_features_are_added_replaced_and_widened(tmp_path: Path):
    path = tmp_path / "S1.h5"
    write(path)
    with SlideStore(path) as store:
        before = store.sha256
    large = np.full((SPOTS, 3), 1e6)
    add_features(path, "uni", large)
    with SlideStore(path) as store:
        np.testing.assert_array_equal(store.features("uni"), large)
        assert store.sha256 != before
    add_features(path, "uni", np.ones((SPOTS, 1)))
    with SlideStore(path) as store:
        assert store.features("uni").shape == (SPOTS, 1)
        assert store.features("uni").dtype == np.float32
        assert store.feature_names == ["handcrafted", "uni"]
        assert store.counts().shape == (SPOTS, 400)
        with pytest.raises(DataError, match="did you mean 'handcrafted'"):
            store.features("handcraftd")
    with pytest.raises(DataError, match="3 rows of features for 7"):
        add_features(path, "uni", np.ones((3, 1)))
    with pytest.raises(DataError, match="all finite"):
        add_features(path, "uni", np.full((SPOTS, 1), np.nan))
    with pytest.raises(DataError, match="not a plain name"):
        add_features(path, "a/b", np.ones((SPOTS, 1)))
    assert [p.name for p in tmp_path.iterdir()] == ["S1.h5"]
    with h5py.File(path) as file:
        assert file["features/handcrafted"].dtype == np.float16


def breaking_patches():
    yield 0, smooth_patches()[0]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"patches": breaking_patches()}, KeyboardInterrupt, None),
        ({"patches": [(0, smooth_patches()[0])]}, DataError, "6 of 7 spots got no patch"),
        ({"patches": [(0, smooth_patches()[0])] * 2}, DataError, "spot 0 got two patches"),
        ({"patches": [(0, np.zeros((8, 8, 3), np.uint8))]}, DataError, r"\(8, 8, 3\); expected"),
        ({"features": {"x": np.zeros((2, 2))}}, DataError, "'x' have 2 rows"),
        ({"tissue_fraction": np.zeros(2)}, DataError, "2 values for 7 spots"),
        ({"encoding": "png"}, DataError, "choose jpeg or raw"),
    ],
)
def test_interrupted_writing_leaves_no_file(
    tmp_path: Path, change: dict[str, object], error: type[BaseException], said: str | None
):
    with pytest.raises(error, match=said):
        write(tmp_path / "S1.h5", **change)
    assert list(tmp_path.iterdir()) == []


def test_an_old_store_survives_a_failed_new_one(tmp_path: Path):
    write(tmp_path / "S1.h5")
    before = (tmp_path / "S1.h5").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "S1.h5", patches=breaking_patches())
    assert (tmp_path / "S1.h5").read_bytes() == before


def test_files_that_are_no_store_are_refused(tmp_path: Path):
    path = tmp_path / "S1.h5"
    with pytest.raises(DataError, match="does not exist"):
        SlideStore(path)
    path.write_text("slide_id,patient_id\n")
    with pytest.raises(DataError, match=r"not a complete HDF5 file.*prepare"):
        SlideStore(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"not a complete HDF5 file.*prepare"):
        SlideStore(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="not a slide store"):
        SlideStore(path)


def test_parts_are_looked_at_once_and_again_after_a_change(tmp_path: Path, monkeypatch):
    """Also another schema version and missing parts, each in the place of a sound store."""
    path = tmp_path / "S1.h5"
    write(path)
    looks: list[object] = []
    monkeypatch.setattr("preprocessing.store.layout.require_schema", looks.append)
    for _ in range(3):
        SlideStore(path).close()
    assert len(looks) == 1
    with h5py.File(path, "r+") as file:
        del file["spots/barcode"]
    with pytest.raises(DataError, match="lacks spots/barcode"):
        SlideStore(path)
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(
        DataError, match=r"schema version 99, this program reads version 1.*prepare"
    ):
        SlideStore(path)


def test_damaged_attributes_are_named(tmp_path: Path):
    write(tmp_path / "S1.h5")
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        file.attrs["settings"] = "{"
    with pytest.raises(DataError, match=r"damaged attributes.*prepare"):
        SlideStore(tmp_path / "S1.h5")
    assert [f.level for f in verify_store(tmp_path / "S1.h5")] == ["FAIL"]


def replaced(file: h5py.File, name: str, values: object) -> None:
    del file[name]
    file[name] = values


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f["counts/indices"].__setitem__(slice(None), 9999), "damaged counts"),
        (lambda f: replaced(f, "counts/data", -np.ones(f["counts/data"].shape, np.int32)),
         "non-negative"),
        (lambda f: replaced(f, "spots/xy_um", np.zeros((3, 2))), r"xy_um has shape \(3, 2\)"),
        (lambda f: replaced(f, "spots/xy_px0", np.full((SPOTS, 2), np.nan)), "not finite"),
        (lambda f: replaced(f, "spots/xy_px0", np.zeros((SPOTS, 2))), "not xy_px0"),
        (lambda f: f.attrs.__setitem__("slide_size_px0", [10, 10]), "outside the image"),
        (lambda f: f.attrs.__setitem__("mpp", np.nan), "mpp is nan"),
        (lambda f: replaced(f, "patches/bytes", np.zeros(f["patches/bytes"].shape, np.uint8)),
         "is damaged"),
        (lambda f: replaced(f, "features/handcrafted", np.full((SPOTS, 2), np.inf)),
         "are not finite"),
        (lambda f: f["spots/barcode"].__setitem__(0, "s1"), "barcodes occur twice"),
    ],
)  # fmt: skip
def test_verify_finds_planted_damage(tmp_path: Path, damage, said: str):
    path = tmp_path / "S1.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    findings = [f for f in verify_store(path) if f.level == "FAIL"]
    assert findings
    assert any(said.replace("\\", "") in f.message for f in findings), [str(f) for f in findings]
    assert all(f.fix for f in findings)


def labelled(file: h5py.File, **attributes: object) -> None:
    file["spots/label/x"] = np.ones(SPOTS)
    file["spots/label/x"].attrs.update(attributes)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: replaced(f, "spots/xy_um", f["spots/xy_um"][:-2]), "spots/xy_um has shape"),
        (lambda f: replaced(f, "spots/xy_px0", ["x"] * SPOTS), "spots/xy_px0 holds values of type"),
        (lambda f: replaced(f, "spots/barcode", np.arange(SPOTS)), "spots/barcode holds values"),
        (lambda f: replaced(f, "spots/barcode", 3), "have shapes"),
        (lambda f: replaced(f, "genes/name", ["a"]), "genes/name has shape"),
        (lambda f: replaced(f, "features/handcrafted", np.ones(SPOTS)), "features/handcrafted has"),
        (lambda f: replaced(f, "features/handcrafted", np.ones((SPOTS - 1, 2))), "features/handcr"),
        (lambda f: replaced(f, "counts/indptr", np.arange(SPOTS)), "counts/indptr has shape"),
        (lambda f: replaced(f, "counts/indices", np.arange(2)), "counts/indices has shape"),
        (lambda f: replaced(f, "counts", 3), "damaged attributes"),
        (lambda f: f["counts"].attrs.__setitem__("shape", (SPOTS - 1, 2)), "counts has shape"),
        (lambda f: f["counts"].attrs.__setitem__("shape", 5), "damaged attributes"),
        (lambda f: f.attrs.__setitem__("mpp", "x"), "mpp is no number"),
        (lambda f: f.attrs.__delitem__("patch_px"), "patch_px is no number"),
        (lambda f: replaced(f, "patches/start", np.arange(3)), "patches/start has shape"),
        (lambda f: replaced(f, "patches/size", np.ones(SPOTS)), "patches/size holds values"),
        (lambda f: replaced(f, "spots/label", 3), "damaged attributes"),
        (lambda f: f.__setitem__("spots/label/x", np.ones(SPOTS)), "lacks the attribute"),
        (lambda f: f.__setitem__("spots/label/x", np.ones(2)), "x has shape"),
        (lambda f: labelled(f, name="x", position="x"), "position is no number"),
        (lambda f: labelled(f, name="x", position=np.nan), "position is not finite"),
        (lambda f: labelled(f, name=[1], position=1), "lacks the attribute name"),
        (lambda f: f.attrs.__setitem__("mpp", [1.0, 2.0]), "mpp is no number"),
        (lambda f: f.attrs.__setitem__("patch_um", 0), "patch_um is 0.0, expected"),
        (lambda f: f["thumbnail"].attrs.__setitem__("downsample", 0), "downsample is 0.0, expect"),
    ],
)  # fmt: skip
def test_another_schema_of_a_part_is_refused_at_opening(tmp_path: Path, damage, said: str):
    path = tmp_path / "S1.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=said) as told:
        SlideStore(path)
    assert str(path) in str(told.value)
    assert [f.level for f in verify_store(path)] == ["FAIL"]


def test_values_that_are_not_finite_are_counted_by_spot(tmp_path: Path):
    path = tmp_path / "S1.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        values = np.ones((SPOTS, 4))
        values[2, 1] = values[2, 3] = np.nan
        replaced(file, "features/handcrafted", values)
        replaced(file, "spots/xy_um", values[:, :2])
    with SlideStore(path) as store:
        with pytest.raises(DataError, match=rf"S1.h5: features .* of 1 of {SPOTS} spots"):
            store.features("handcrafted")
        with pytest.raises(DataError, match=rf"S1.h5: spots/xy_um of 1 of {SPOTS} spots"):
            _ = store.xy_um


def test_a_thumbnail_that_claims_many_pixels_is_refused(tmp_path: Path):
    path = tmp_path / "S1.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        data = file["thumbnail"][:]
        place = bytes(data).index(b"\xff\xc0")
        data[place + 5 : place + 9] = 255  # 65,535 x 65,535 pixels
        attributes = dict(file["thumbnail"].attrs)
        replaced(file, "thumbnail", data)
        file["thumbnail"].attrs.update(attributes)
    with SlideStore(path) as store, pytest.raises(DataError, match="damaged thumbnail"):
        _ = store.thumbnail


def test_verify_passes_a_whole_store_and_warns_of_an_empty_label(tmp_path: Path):
    write(tmp_path / "S1.h5")
    findings = verify_store(tmp_path / "S1.h5")
    assert [(f.level, f.message.split("'")[1]) for f in findings] == [("WARN", "..")]


def test_stores_in_lists_whole_stores_only(tmp_path: Path):
    with pytest.raises(DataError, match="holds no store"):
        stores_in(tmp_path)
    for name in ("B.h5", "A.h5", ".A.1234.part.h5", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [p.name for p in stores_in(tmp_path)] == ["A.h5", "B.h5"]
    with pytest.raises(DataError, match="is not a folder"):
        stores_in(tmp_path / "none")
