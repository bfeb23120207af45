"""Tables of slides in every format, and the field's own programs on them (where installed)."""

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from eval.embed import embed_folder, region_names
from eval.predict import Wanted, predict_folder
from eval.query import query_folder
from eval.tables import (
    hashes_of,
    lay_out,
    open_folder,
    read_table,
    table_path,
    tables_in,
    write_table,
)
from hibio import keys
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.hdf5 import write_h5ad, write_rows
from preprocessing.hest_layout import obs_columns
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlidePicture, SlideStore, write_store
from tests.eval.image_cohort import Cohort
from tests.preprocessing.sources import zarr_group

LABELS = ["a b", "A_b", "_index", "__own", "kind/deep", "..", "slide_id", "größe µm"]


@pytest.fixture(params=[True, False], ids=["image", "counts only"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SlideStore:
    """A slide of 12 spots, 50 level-0 pixels apart, with labels of every odd name."""
    across, down = np.meshgrid(np.arange(4), np.arange(3))
    xy = 50.0 * np.stack([across.ravel(), down.ravel()], axis=1) + 25
    table = SpotTable(
        csr_matrix(np.ones((12, 2), dtype=np.int32)),
        np.array(["g1", "g2"], dtype=object),
        np.array(["G1", "G2"], dtype=object),
        np.array([f"s{i}" for i in range(12)], dtype=object),
        xy,
        xy * 2.0,
        2.0,
        labels=pd.DataFrame({name: ["x"] * 12 for name in LABELS}),
        diameter_um=60.0,
    )
    patches = picture = None
    if request.param:
        small = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        patches = ((i, np.zeros((8, 8, 3), np.uint8)) for i in range(12))
        picture = SlidePicture((200, 150), small, 5.0)
    row, patch = SlideRow("s", "p", None, "h5ad"), PatchConfig(100.0, 8)
    write_store(tmp_path / "s.h5", table, row, patches=patches, patch=patch, picture=picture)
    with SlideStore(tmp_path / "s.h5") as opened:
        yield opened


def written(store: SlideStore, path: Path) -> anndata.AnnData:
    labels = obs_columns(store.label_columns(), taken=("slide_id",))
    obs = store.labels().set_axis(list(labels), axis=1).set_axis(pd.Index(store.barcodes), axis=0)
    adata = anndata.AnnData(store.counts(), obs, pd.DataFrame(index=pd.Index(store.gene_names)))
    lay_out(adata, store)
    adata.obs["region"] = region_names("s", np.arange(12)[::-1])
    adata.uns["hibio"] = {"labels": labels}
    write_h5ad(path, adata)
    return anndata.read_h5ad(path)


def test_columns_are_valid_and_their_labels_are_kept(store: SlideStore, tmp_path: Path):
    adata = written(store, tmp_path / "a.h5ad")
    assert set(adata.uns["hibio"]["labels"].values()) == set(LABELS)
    columns = list(adata.uns["hibio"]["labels"])
    assert all(c.replace("_", "").replace(".", "").replace("-", "").isalnum() for c in columns)
    lower = [column.lower() for column in adata.obs]
    assert len(set(lower)) == len(lower)
    assert not {"_index", ".", ".."} & set(lower)
    assert not [column for column in columns if column.startswith("__")]


def test_regions_are_named_in_order():
    regions = region_names("A1", np.array([10, 2, 0, 2]))
    assert list(regions) == ["A1:10", "A1:02", "A1:00", "A1:02"]
    assert list(regions.categories) == ["A1:00", "A1:02", "A1:10"]
    assert regions.max() == "A1:10"


def test_the_clients_draw_it(store: SlideStore, tmp_path: Path):
    squidpy = pytest.importorskip("squidpy", reason="squidpy is not installed")
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed")
    models = pytest.importorskip("spatialdata.models", reason="spatialdata is not installed")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    adata = written(store, tmp_path / "a.h5ad")
    pictured = "spatial" in adata.uns
    asked = {} if pictured else {"shape": None}  # spots without a picture have no drawn size
    squidpy.pl.spatial_scatter(adata, color=["region", "G1"], **asked)
    assert {axes.get_title() for axes in plt.gcf().axes} >= {"region", "G1"}
    if pictured:
        drawn = scanpy.pl.spatial(adata, color="region", show=False)
        assert [axes.get_title() for axes in drawn] == ["region"]
    assert models.TableModel.parse(adata).n_obs == adata.n_obs


FORMS = ("h5ad", "zarr", "spatialdata")
SEALS = {"checkpoint_sha256": "c", "store_sha256": "s"}


def given(store: SlideStore, tmp_path: Path) -> anndata.AnnData:
    """A table without X, of two regions a level, for `values`."""
    adata = written(store, tmp_path / "given.h5ad")
    del adata.X
    adata.obs = adata.obs[["slide_id", "größe_µm"]]
    adata.obs["hibio_region_600um"] = region_names("s", np.arange(12) // 6)
    adata.obsm["X_hibio_image"] = np.random.default_rng(1).random((12, 3))
    adata.uns["hibio"] |= SEALS
    return adata


def values(part: slice) -> dict[str, np.ndarray]:
    found = np.arange(24, dtype=np.float32).reshape(12, 2)[part]
    return {"X": found, "layers/lower": found - 1}


@pytest.mark.parametrize("store", [True], indirect=True, ids=["image"])
@pytest.mark.parametrize("form", FORMS)
def test_every_format_holds_the_same_and_is_replaced_whole(
    store: SlideStore, tmp_path: Path, form: str
):
    if form == "spatialdata":
        pytest.importorskip("spatialdata", reason='pip install "hibio[interop]"')
    out = tmp_path / "out"
    path = table_path(out, "s", form)
    assert hashes_of(path) is None
    wanted = given(store, tmp_path)
    for extra in ("X_old", "X_hibio_image"):  # the second time nothing of the first is left
        adata = wanted.copy()
        adata.obsm[extra] = wanted.obsm["X_hibio_image"]
        write_table(path, adata, values)
    found = read_table(path)
    assert set(found.obsm) == set(wanted.obsm)
    np.testing.assert_array_equal(found.X, values(slice(None))["X"])
    np.testing.assert_array_equal(found.layers["lower"], found.X - 1)
    for name in wanted.obsm:
        np.testing.assert_array_equal(found.obsm[name], wanted.obsm[name])
    pd.testing.assert_frame_equal(found.obs[list(wanted.obs)], wanted.obs)
    regions = found.obs["hibio_region_600um"].cat
    assert (regions.ordered, list(regions.categories)) == (True, ["s:0", "s:1"])
    assert hashes_of(path, "labels_of", "checkpoint_sha256") == {**SEALS, "labels_of": ""}
    assert tables_in(out) == [path]

    def fails(part: slice) -> dict[str, np.ndarray]:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_table(path, wanted.copy(), fails)
    assert read_table(path).shape == (12, 2)
    assert list(out.iterdir()) == [path]


@pytest.mark.parametrize("form", [2, 3])
def test_rows_come_block_by_block(tmp_path: Path, form: int):
    group, asked = zarr_group(tmp_path / "a.zarr", form), []
    write_rows(group, (12, 2), values, block=5, check=lambda: asked.append(1))
    assert len(asked) == 3
    np.testing.assert_array_equal(group["X"][:], values(slice(None))["X"])


@pytest.mark.parametrize("form", FORMS[1:])
def test_folders_of_others_stay_and_a_missing_package_is_told(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    path = table_path(tmp_path, "s", form)
    path.mkdir()
    for content, told in (("{}", "was not made by this command"), ("{", "is damaged")):
        (path / "zarr.json").write_text(content)
        with pytest.raises(DataError, match=told):
            hashes_of(path)
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    extra = {"zarr": "spatialdata", "spatialdata": "interop"}[form]
    with pytest.raises(ConfigError, match=rf'pip install "hibio\[{extra}\]"'):
        open_folder(tmp_path / "new", form)
    assert not (tmp_path / "new").exists()


def test_commands_write_zarr_with_the_values_of_h5ad_and_keep_what_is_whole(
    cohort: Cohort, tmp_path: Path
):
    pytest.importorskip("zarr", reason='pip install "hibio[spatialdata]"')
    slide, genes = cohort.images / "bare.h5", ("AR",)

    def predicted(form: str) -> Path:
        wanted = Wanted(genes, regions=True, form=form)
        return predict_folder(cohort.checkpoint, [slide], tmp_path, wanted)[0]

    tables = embed_folder(cohort.checkpoint, slide, tmp_path, form="zarr")
    tables += query_folder(cohort.checkpoint, slide, "default", tmp_path, form="zarr")[:1]
    tables.append(predicted("zarr"))
    assert [path.name for path in tables] == ["bare.zarr", "bare.query.zarr", "bare.predict.zarr"]
    assert "hibio_region_600um" in read_table(tables[0]).obs
    assert read_table(tables[1]).n_vars > 1
    one, same = read_table(tables[2]), read_table(predicted("h5ad"))
    pd.testing.assert_frame_equal(one.obs, same.obs)
    np.testing.assert_allclose(one.to_df(), same.to_df(), rtol=1e-5)
    assert set(one.uns["hibio"]) == set(same.uns["hibio"])
    made = tables[2].stat().st_mtime_ns
    assert predicted("zarr").stat().st_mtime_ns == made


def test_spatialdata_opens_it_with_all_in_its_place(store: SlideStore, tmp_path: Path):
    spatialdata = pytest.importorskip("spatialdata", reason='pip install "hibio[interop]"')
    path = table_path(tmp_path, "s", "spatialdata")
    wanted = given(store, tmp_path)
    write_table(path, wanted.copy(), values)
    found = spatialdata.read_zarr(path)
    assert found.coordinate_systems == ["global"]
    spots = spatialdata.transform(found["spots_s"], to_coordinate_system="global")
    places = np.stack([spots.geometry.x, spots.geometry.y], axis=1)
    np.testing.assert_allclose(places, wanted.obsm["spatial"])
    radius = 25.0 if store.thumbnail is None else 15.0  # half of 50 px, or 60 um of 2 um a pixel
    np.testing.assert_allclose(spots.radius, radius)
    element, table = spatialdata.join_spatialelement_table(
        sdata=found, spatial_element_names="spots_s", table_name="table", how="inner"
    )
    assert list(element["spots_s"].index) == list(table.obs[keys.OBS_SPOT]) == list(table.obs_names)
    np.testing.assert_array_equal(table.X, values(slice(None))["X"])
    regions = found["regions_600um_s"]
    assert list(regions.index) == ["s:0", "s:1"]
    assert regions.is_valid.all()
    own = regions.geometry.iloc[np.arange(12) // 6].reset_index(drop=True)
    assert own.contains(spots.geometry.reset_index(drop=True)).all()
    assert ("image_s" in found.images) == (store.thumbnail is not None)
    if store.thumbnail is not None:
        corner = spatialdata.get_extent(found["image_s"], coordinate_system="global")
        assert (corner["x"], corner["y"]) == ((0.0, 200.0), (0.0, 150.0))
        np.testing.assert_array_equal(
            np.moveaxis(found["image_s"].to_numpy(), 0, 2), store.thumbnail
        )
