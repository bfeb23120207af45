"""GeoJSON for QuPath, projects for TissUUmaps: places, values, colours, and what is refused."""

import json
from contextlib import suppress
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval import export
from eval.embed import region_names
from hibio import keys
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.hdf5 import write_h5ad

PITCH = 40.0
PICTURE = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """36 spots: an outer region around an inner one, and a third far away; one value is missing."""
    across, down = np.meshgrid(np.arange(6), np.arange(6))
    xy = PITCH * np.stack([across.ravel(), down.ravel()], axis=1) + 1000
    inner = ((across > 1) & (across < 4) & (down > 1) & (down < 4)).ravel()
    code = np.where(inner, 1, 0)
    xy, code = np.vstack([xy, xy[:2] + 4000]), np.append(code, [2, 2])
    adata = anndata.AnnData(np.linspace(0, 1, 76).reshape(38, 2))
    adata.var_names, adata.obs_names = ["HYPOXIA", "CELL CYCLE"], [f"s{i}" for i in range(38)]
    adata.X[5, 1] = np.nan
    adata.obs[keys.OBS_SLIDE] = pd.Categorical(["A1"] * 38)
    adata.obs[keys.OBS_REGION + "600um"] = region_names("A1", code)
    adata.obsm[keys.OBSM_SPATIAL], adata.obsm[keys.OBSM_UM] = xy, xy / 2
    adata.uns[keys.UNS] = {"checkpoint_sha256": "c", "store_sha256": "s"}
    factors = {"tissue_hires_scalef": 0.01, "microns_per_pixel": 0.5}
    adata.uns["spatial"] = {"A1": {"images": {"hires": PICTURE}, "scalefactors": factors}}
    write_h5ad(tmp_path / "A1.query.h5ad", adata)
    return tmp_path


def features(path: Path) -> list[dict]:
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection"
    assert len({one["id"] for one in found["features"]}) == len(found["features"])
    return found["features"]


def area(rings: list) -> float:
    """Of a polygon with holes, by the shoelace rule."""
    sizes = []
    for ring in rings:
        assert ring[0] == ring[-1]
        x, y = np.array(ring).T
        sizes.append(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)
    return sizes[0] - sum(sizes[1:])


@pytest.mark.parametrize("bad", [np.nan, "x", None])
@pytest.mark.parametrize("kind", ["regions", "heatmap"])
def test_places_that_are_no_numbers_are_told(table: Path, tmp_path: Path, kind: str, bad: object):
    with h5py.File(table / "A1.query.h5ad", "r+") as file:
        told = dict(file["obsm/spatial"].attrs)
        values = file["obsm/spatial"][:]
        del file["obsm/spatial"]
        other = values[:, :1] if bad is None else np.full(values.shape, bad, dtype=type(bad))
        file.create_dataset(
            "obsm/spatial", data=other.astype(h5py.string_dtype()) if bad == "x" else other
        ).attrs.update(told)
    with pytest.raises(ConfigError, match="obsm/spatial is not two finite numbers a spot"):
        export.export_folder(kind, table, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_regions_cover_the_ground_of_their_spots(table: Path, tmp_path: Path):
    (path,) = export.export_folder("regions", table, tmp_path / "out")
    outer, inner, far = features(path)
    assert [one["properties"]["name"] for one in (outer, inner, far)] == ["A1:0", "A1:1", "A1:2"]
    assert [len(one["geometry"]["coordinates"]) for one in (outer, inner, far)] == [2, 1, 1]
    assert area(inner["geometry"]["coordinates"]) == pytest.approx(4 * PITCH**2, rel=0.1)
    whole = area(outer["geometry"]["coordinates"]) + area(inner["geometry"]["coordinates"])
    assert 36 * PITCH**2 * 0.9 < whole < (6.5 * PITCH) ** 2 * 1.1
    hole = np.array(inner["geometry"]["coordinates"][0])
    np.testing.assert_allclose(hole.mean(axis=0), 1000 + 2.5 * PITCH, atol=PITCH / 4)
    assert np.array(far["geometry"]["coordinates"][0]).min() > 4900
    assert [one["properties"]["measurements"]["spots"] for one in (outer, inner, far)] == [32, 4, 2]
    assert {one["properties"]["objectType"] for one in (outer, inner, far)} == {"annotation"}
    names = {one["properties"]["classification"]["name"] for one in (outer, inner, far)}
    assert names == {"600um A1:0", "600um A1:1", "600um A1:2"}


def test_a_heatmap_has_each_value_at_its_spot(table: Path, tmp_path: Path):
    (path,) = export.export_folder("heatmap", table / "A1.query.h5ad", tmp_path / "out")
    again = export.export_folder("heatmap", table, tmp_path / "out")  # over its own
    adata = anndata.read_h5ad(table / "A1.query.h5ad")
    spots = features(path)
    assert again == [path]
    assert len(spots) == 38
    for spot, place, values in zip(spots, adata.obsm["spatial"], adata.X, strict=True):
        ring = np.array(spot["geometry"]["coordinates"][0])[:-1]
        np.testing.assert_allclose(ring.mean(axis=0), place, atol=0.2)
        assert np.ptp(ring[:, 0]) == pytest.approx(PITCH, abs=0.2)
        wanted = dict(zip(adata.var_names, values, strict=True))
        assert spot["properties"]["measurements"] == pytest.approx(
            {name: value for name, value in wanted.items() if np.isfinite(value)}
        )
    assert spots[0]["properties"]["color"] == [68, 1, 84]  # the ends of viridis
    assert spots[-1]["properties"]["color"] == [253, 231, 36]


@pytest.mark.parametrize(
    ("kind", "names", "told"),
    [
        ("heatmap", ["ERBB2"], "'ERBB2' is no gene, gene set or number of this file$"),
        ("heatmap", ["HYPOXI"], "number of this file; did you mean 'HYPOXIA'"),
        ("regions", ["5um"], "levels of regions there: 600um"),
        ("qc", ["depth"], "leave --names out"),
    ],
)
def test_what_is_not_there_is_told(table: Path, tmp_path: Path, kind, names, told):
    with pytest.raises(ConfigError, match=told):
        export.export_folder(kind, table, tmp_path / "out", names)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("form", ["geojson", "tmap"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: anndata.concat([a, another(a)], uns_merge="first"), "76 spots of 2 slides"),
        (lambda a: a[:0].copy(), "0 spots of 0 slides, expected one slide"),
        (lambda a: a[5:6, ["CELL CYCLE"]].copy(), "'CELL CYCLE' is known of no spot"),
    ],
)
def test_a_table_that_is_not_of_one_slide_or_says_nothing_is_told(
    table: Path, tmp_path: Path, change, told, form
):
    path = table / "A1.query.h5ad"
    write_h5ad(path, change(anndata.read_h5ad(path)))
    with pytest.raises(ConfigError, match=told):
        export.export_folder("heatmap", path, tmp_path / "out", form=form)
    assert not list((tmp_path / "out").glob("*"))


def another(adata: anndata.AnnData) -> anndata.AnnData:
    """The same spots as those of another slide."""
    found = adata.copy()
    found.obs[keys.OBS_SLIDE] = pd.Categorical(["B1"] * len(found))
    return found


def test_files_of_others_stay(table: Path, tmp_path: Path):
    other = tmp_path / "out" / "A1.heatmap.geojson"
    other.parent.mkdir()
    other.write_text("{}")
    with pytest.raises(DataError, match="was not made by this command"):
        export.export_folder("heatmap", table, other.parent)
    assert other.read_text() == "{}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no .h5ad file there"):
        export.export_folder("heatmap", tmp_path / "empty", other.parent)


def test_quality_marks_the_flagged_spots(toy_stores: Path, tmp_path: Path):
    store = sorted(toy_stores.glob("*.h5"))[0]
    (path,) = export.export_folder("qc", store, tmp_path)
    spots = features(path)
    (tmap,) = export.export_folder("qc", store, tmp_path, form="tmap")
    flags = project_of(tmap)["markerFiles"][0]
    column = pd.read_csv(tmap.with_suffix(".csv"))[flags["expectedHeader"]["gb_col"]]
    assert set(column) == set(json.loads(flags["expectedHeader"]["cb_gr_dict"]))
    assert {"depth", "n_genes"} <= set(spots[0]["properties"]["measurements"])
    flagged = [spot for spot in spots if "classification" in spot["properties"]]
    assert all(len(spot["properties"]["classification"]["color"]) == 3 for spot in flagged)


def project_of(path: Path) -> dict:
    """A TissUUmaps project, by its published schema where that is installed; all is beside it."""
    found = json.loads(path.read_text())
    with suppress(ImportError):
        from tissuumaps_schema.v01.project import Project

        Project.parse(found)
    paths = [one["tileSource"].removesuffix(".dzi") for one in found.get("layers", ())]
    paths += [one["path"] for part in ("markerFiles", "regionFiles") for one in found.get(part, ())]
    assert all(Path(one).name == one and (path.parent / one).is_file() for one in paths)
    return found


def test_tissuumaps_finds_every_value_at_its_place(table: Path, tmp_path: Path):
    (path,) = export.export_folder("heatmap", table, tmp_path / "out", form="tmap")
    assert export.export_folder("heatmap", table, tmp_path / "out", form="tmap") == [path]
    project, adata = project_of(path), anndata.read_h5ad(table / "A1.query.h5ad")
    assert project["mpp"] == pytest.approx(50.0)  # of a pixel of the picture
    with Image.open(path.with_suffix(".png")) as picture:
        np.testing.assert_array_equal(np.asarray(picture), PICTURE)
    for markers in project["markerFiles"]:
        header, frame = markers["expectedHeader"], pd.read_csv(path.parent / markers["path"])
        places = frame[[header["X"], header["Y"]]] * header["coord_factor"]
        np.testing.assert_allclose(places, adata.obsm["spatial"] / 100, atol=0.002)
        assert header["cb_col"] == "HYPOXIA"
        np.testing.assert_allclose(frame[list(adata.var_names)], adata.X)  # the missing one too
    choices = project["markerFiles"][1]["dropdownOptions"]
    assert [one["expectedHeader.cb_col"] for one in choices] == ["HYPOXIA", "CELL CYCLE"]


def test_tissuumaps_finds_the_regions_on_the_picture(table: Path, tmp_path: Path):
    (plain,) = export.export_folder("regions", table, tmp_path / "out")
    (path,) = export.export_folder("regions", table, tmp_path / "out", form="tmap")
    (shown,) = project_of(path)["regionFiles"]
    for one, scaled in zip(features(plain), features(path.parent / shown["path"]), strict=True):
        assert one["properties"] == scaled["properties"]
        outer, small = (np.array(x["geometry"]["coordinates"][0]) for x in (one, scaled))
        np.testing.assert_allclose(outer / 100, small, atol=1e-3)
    path.write_text("{}")
    with pytest.raises(DataError, match="was not made by this command"):
        export.export_folder("regions", table, tmp_path / "out", form="tmap")
    adata = anndata.read_h5ad(table / "A1.query.h5ad")
    adata.uns["spatial"] = {"A1": {"images": {}}}  # its picture was taken out to save room
    write_h5ad(table / "A1.query.h5ad", adata)
    assert export.export_folder("regions", table, tmp_path / "new")
    with pytest.raises(ConfigError, match="has no picture, and TissUUmaps"):
        export.export_folder("regions", table, tmp_path / "new", form="tmap")


def test_shapes_are_valid_polygons(table: Path, tmp_path: Path):
    geopandas = pytest.importorskip("geopandas", reason='pip install "hibio[interop]"')
    for kind in ("regions", "heatmap"):
        (path,) = export.export_folder(kind, table, tmp_path)
        frame = geopandas.read_file(path)
        assert frame.is_valid.all()
        assert frame.geometry.area.gt(0).all()
