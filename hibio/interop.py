"""WSIData of LazySlide in, tables out: the tiles of a slide are predicted where they lie.

``adata = model.predict(tile_images(model, wsi)); add_table(wsi, adata)``. Needs the package wsidata
(``pip install "hibio[interop]"``). Shapes: S tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from hibio.checkpoint import READOUT
from hibio.config.files import ConfigError
from hibio.model import HiBio
from hibio.readout import read_readout
from preprocessing.patches import PatchConfig
from preprocessing.run.preparation import HANDCRAFTED, handcrafted_features
from preprocessing.run.sifting import patches_of
from preprocessing.scale import SAME
from preprocessing.slides import open_slide
from preprocessing.spot_table import SpotTable

__all__ = ["add_table", "tile_images"]


def tile_images(
    model: HiBio, wsi: Any, tiles: str = "tiles", features: str | None = None
) -> np.ndarray:
    """What `HiBio.predict` and `encode_image` take, of the tiles of one slide.

    Patches are read from the slide's file about the centres of the tiles, as `hibio prepare` reads
    them; they have the width that the model was trained on, so the tiles must have it too.

    Args:
        model: loaded from a checkpoint.
        wsi: a `wsidata.WSIData` with tiles.
        tiles: their key.
        features: key of features that LazySlide extracted, for a model that reads those of an
            encoder; it must be the same encoder.

    Returns:
        Features (S, F), or patches (S, px, px, 3) uint8, in the order of the tiles.

    Raises:
        ConfigError: no such tiles or features, no resolution, or tiles of another width.
        DataError: the slide cannot be read.
    """
    if model.folder is None:
        raise ConfigError("tiles need a model of a checkpoint; load it with from_checkpoint")
    readout = read_readout(model.folder / READOUT)
    table = _tile_table(wsi, tiles, model.artifacts.settings.patch_um)
    if features is not None:
        try:
            found = wsi.fetch.features_anndata(features, tiles, tile_graph=False)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"no features {features!r} of {tiles!r}: {error}") from error
        return np.asarray(found.X, dtype=np.float32)
    if readout.features not in ("", HANDCRAFTED):
        raise ConfigError(
            f"the model reads features of {readout.features!r}; extract them with LazySlide from "
            "these tiles and give their key: features=KEY"
        )
    patch = PatchConfig(model.artifacts.settings.patch_um, int(readout.source["patch_px"]))
    with open_slide(Path(wsi.reader.file)) as slide:
        if readout.features:
            return handcrafted_features(slide, table, patch)
        images = np.empty((len(table.xy_px0), patch.patch_px, patch.patch_px, 3), np.uint8)
        for tile, pixels in patches_of(slide, table, patch):
            images[tile] = pixels
    return images


def add_table(wsi: Any, adata: anndata.AnnData, name: str = "hibio", tiles: str = "tiles") -> str:
    """Put a table of tiles into a WSIData, linked to its tiles as LazySlide's features are.

    Args:
        wsi: a `wsidata.WSIData`.
        adata: one row a tile, in their order; ``var``, ``layers`` and ``obs`` come along.
        name: of the table: ``wsi.fetch.features_anndata(name, tiles)`` finds it.
        tiles: key of the tiles.

    Returns:
        The key of the table, ``<name>_<tiles>``.

    Raises:
        ConfigError: another number of rows than tiles.
    """
    from spatialdata.models import TableModel

    frame = _tiles_of(wsi, tiles)
    if adata.n_obs != len(frame):
        raise ConfigError(f"{adata.n_obs} rows for the {len(frame)} tiles {tiles!r}")
    table = adata.copy()
    number = frame["tile_id"] if "tile_id" in frame else np.arange(len(frame))
    table.obs["tile_id"] = np.asarray(number)
    table.obs["library_id"] = pd.Categorical([tiles] * len(frame))
    linked = {"region": tiles, "region_key": "library_id", "instance_key": "tile_id"}
    wsi.tables[f"{name}_{tiles}"] = TableModel.parse(table, **linked)
    return f"{name}_{tiles}"


def _tiles_of(wsi: Any, tiles: str) -> Any:
    if tiles not in wsi.shapes or not len(wsi.shapes[tiles]):
        raise ConfigError(
            f"no tiles {tiles!r} (shapes: {', '.join(wsi.shapes) or 'none'}); make them with "
            "lazyslide.pp.tile_tissues, or give their key"
        )
    return wsi.shapes[tiles]


def _tile_table(wsi: Any, tiles: str, patch_um: float | None) -> SpotTable:
    """The centres of the tiles, as places without counts."""
    frame, mpp = _tiles_of(wsi, tiles), wsi.properties.mpp
    if mpp is None:
        raise ConfigError("the slide does not say how large a pixel is; wsi.set_mpp(0.5) does")
    left, top, right, bottom = frame.bounds.to_numpy(dtype=np.float64).T
    width = float(np.median(right - left)) * mpp
    if patch_um is not None and abs(width / patch_um - 1) > SAME:
        raise ConfigError(
            f"the tiles {tiles!r} are {width:g} um wide, and the model reads {patch_um:g} um; make "
            f"tiles of {patch_um / mpp:.1f} pixels at {mpp:g} um a pixel"
        )
    xy = np.stack([(left + right) / 2, (top + bottom) / 2], axis=1)
    names = frame.index.to_numpy().astype(str).astype(object)
    none = np.empty(0, dtype=object)
    counts = csr_matrix((len(xy), 0), dtype=np.int32)
    return SpotTable(counts, none, none, names, xy, xy * mpp, mpp, image_only=True)
