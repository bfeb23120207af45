"""Tiles of LazySlide: read as a store is, and a table that is linked to them.

wsidata is in `pip install "hibio[interop]"`; without it only what is refused is tested.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest

from eval.embed import load_checkpoint
from eval.predict import readout_of
from hibio.config.files import ConfigError
from hibio.interop import add_table, tile_images
from hibio.model import HiBio
from preprocessing.files import files_in
from preprocessing.store import SlideStore
from tests.eval.image_cohort import Cohort, cohort  # noqa: F401 - a fixture


@pytest.fixture
def model(cohort: Cohort, tmp_path: Path) -> HiBio:  # noqa: F811
    path = Path(shutil.copytree(cohort.checkpoint, tmp_path / "checkpoint"))
    readout_of(load_checkpoint(path))
    return HiBio.from_checkpoint(path)


@pytest.mark.skipif(find_spec("wsidata") is None, reason='pip install "hibio[interop]"')
def test_tiles_are_read_as_a_store_is_and_predicted_into_a_linked_table(
    cohort: Cohort,  # noqa: F811
    model: HiBio,
    tmp_path: Path,
):
    import wsidata

    with SlideStore(cohort.images / "grid.h5") as store:
        mpp = store.mpp
        xy, features = store.xy_px0, store.features("handcrafted")
        side = round(store.attrs["patch_um"] / mpp)
    (slide,) = files_in(cohort.stores.parent / "cohort", "slides/sim003.tif")
    wsi = wsidata.open_wsi(slide, store=str(tmp_path / "slide.zarr"))
    wsi.set_mpp(mpp)
    corners = np.rint(xy - side / 2).astype(int)
    spec = wsidata.TileSpec.from_wsidata(wsi, side)
    wsidata.io.add_tiles(wsi, "tiles", corners, spec, np.zeros(len(xy), dtype=int))
    found = tile_images(model, wsi)
    np.testing.assert_allclose(found, features, rtol=0.05, atol=0.02)
    predicted = model.predict(found)
    key = add_table(wsi, predicted)
    again = wsi.fetch.features_anndata("hibio", "tiles")
    np.testing.assert_array_equal(again.X, predicted.X)
    np.testing.assert_allclose(again.obsm["spatial"], corners)
    wsi.write()
    table = wsidata.open_wsi(slide, store=str(tmp_path / "slide.zarr")).tables[key]
    np.testing.assert_array_equal(table.X, predicted.X)
    assert {"familiarity", "tile_id"} <= set(table.obs)
    assert "reliability" in table.var
    np.testing.assert_array_equal(tile_images(model, wsi, features="hibio"), predicted.X)
    with pytest.raises(ConfigError, match="1 rows for the"):
        add_table(wsi, predicted[:1])
    with pytest.raises(ConfigError, match="no features 'uni' of 'tiles'"):
        tile_images(model, wsi, features="uni")


def test_what_tiles_do_not_say_is_told(monkeypatch: pytest.MonkeyPatch):
    bounds = pd.DataFrame([[0, 0, 100, 100]], columns=["minx", "miny", "maxx", "maxy"])
    tiles = MagicMock(bounds=bounds, index=bounds.index, __len__=lambda _: 1)
    settings = SimpleNamespace(settings=SimpleNamespace(patch_um=112.0))
    model = SimpleNamespace(folder=Path("checkpoint"), artifacts=settings)
    readout = SimpleNamespace(features="uni2-h", source={"patch_px": 16})
    monkeypatch.setattr("hibio.interop.read_readout", lambda path: readout)
    for shapes, mpp, told in (
        ({}, 0.5, r"no tiles 'tiles' \(shapes: none\); make them with lazyslide"),
        ({"tiles": tiles}, None, r"wsi.set_mpp"),
        ({"tiles": tiles}, 0.5, "are 50 um wide, and the model reads 112 um; make tiles of 224.0"),
        ({"tiles": tiles}, 1.12, "reads features of 'uni2-h'; extract them with LazySlide"),
    ):
        wsi = SimpleNamespace(shapes=shapes, properties=SimpleNamespace(mpp=mpp))
        with pytest.raises(ConfigError, match=told):
            tile_images(model, wsi)  # type: ignore[arg-type]
    model.folder = None
    with pytest.raises(ConfigError, match="load it with from_checkpoint"):
        tile_images(model, wsi)  # type: ignore[arg-type]


@pytest.mark.skipif(find_spec("lazyslide") is None, reason="pip install lazyslide")
def test_lazyslide_cuts_the_tiles_and_reads_the_table(
    cohort: Cohort,  # noqa: F811
    model: HiBio,
    tmp_path: Path,
):
    import lazyslide
    import wsidata

    with SlideStore(cohort.images / "grid.h5") as store:
        mpp, side = store.mpp, round(store.attrs["patch_um"] / store.mpp)
    (slide,) = files_in(cohort.stores.parent / "cohort", "slides/sim003.tif")
    wsi = wsidata.open_wsi(slide, store=str(tmp_path / "slide.zarr"))
    wsi.set_mpp(mpp)
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, side)
    predicted = model.predict(tile_images(model, wsi))
    assert len(predicted) == len(wsi.shapes["tiles"]) > 1
    key = add_table(wsi, predicted)
    lazyslide.tl.feature_aggregation(wsi, "hibio")
    mean = np.ravel(wsi.tables[key].varm["agg_slide"])
    np.testing.assert_allclose(mean, predicted.X.mean(axis=0), atol=1e-4)
    gene = str(predicted.var_names[0])
    lazyslide.pl.tiles(wsi, feature_key="hibio", color=[gene])
