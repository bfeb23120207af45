"""The tables that `embed`, `query` and `predict` write: AnnData as .h5ad or zarr, or SpatialData.

All hold the same: values, places in level-0 pixels, the thumbnail, and what they were made from
(docs/data.md). One that is there is known again, and one of others is never written over.
Shapes: S spots, R regions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree

from hibio import keys
from hibio.checkpoint import refuse_model_folder
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.files import atomic_path, files_in, not_ours, remove_abandoned
from preprocessing.hdf5 import open_guarded, write_h5ad, write_rows
from preprocessing.hest_layout import DIAMETER, outlines, scale_factors
from preprocessing.scale import spacing_um
from preprocessing.store import SlideStore
from preprocessing.zarr_bounds import check_arrays

H5AD = "h5ad"
IN_SPATIALDATA = Path("tables", "table")
SCALE = "tissue_hires_scalef"  # Space Ranger's name of thumbnail pixels a level-0 pixel
_NEEDS = {"zarr": ("zarr", "spatialdata"), "spatialdata": ("spatialdata", "interop")}  # and extra
HASHES = ("checkpoint_sha256", "store_sha256")  # what a table of ours was made from
_PER_PITCH = 6  # pixels of the ground on which a region is outlined, a distance of spots
_MOST_PIXELS = 1 << 24  # of that ground
Rows = Callable[[slice], Mapping[str, np.ndarray]]


def table_path(out: Path, name: str, form: str) -> Path:
    """Where the table of this name lies, in one of the formats of `keys.TABLES`."""
    return out / f"{name}{keys.TABLES[form]}"


def tables_in(data: Path) -> list[Path]:
    """The tables of a folder, of any format, or the one that ``data`` is.

    Raises:
        ConfigError: there is none.
    """
    if data.is_file() or data.suffix == keys.TABLES["zarr"]:
        return [data]
    folders = (p for p in data.glob("*.zarr") if p.is_dir() and not p.name.startswith("."))
    found = sorted([*files_in(data, "*.h5ad"), *folders])
    if not found:
        raise ConfigError(
            f"{data}: no .h5ad file there, and no .zarr folder; give what `hibio embed`, `query` "
            "or `predict` wrote"
        )
    return found


def read_table(path: Path) -> anndata.AnnData:
    """Read a table of ours in any format.

    Raises:
        ConfigError: it cannot be read, was not made by HiBio, is of an older one, or of several
            slides or none.
    """
    try:
        with open_table(path) as root:
            read = anndata.io.read_zarr if path.is_dir() else anndata.io.read_h5ad
            adata = read(root if path.is_dir() else path)
    except ConfigError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as AnnData ({error})") from error
    if keys.UNS not in adata.uns:
        raise ConfigError(f"{path} was not made by HiBio; give what `hibio embed` or `query` wrote")
    if keys.OBSM_UM not in adata.obsm or keys.OBS_SLIDE not in adata.obs:
        raise ConfigError(f"{path}: of an older HiBio, without pixels; run the command again")
    slides = adata.obs[keys.OBS_SLIDE].unique()
    if len(slides) != 1:
        raise ConfigError(
            f"{path} holds {adata.n_obs} spots of {len(slides)} slides, expected one slide; write "
            f"each to a file of its own: adata[adata.obs['{keys.OBS_SLIDE}'] == NAME]"
        )
    _require_places(path, adata)
    return adata


def _require_places(path: Path, adata: anndata.AnnData) -> None:
    """Refuse places that are not two finite numbers a spot: nothing can be drawn there."""
    for name in (keys.OBSM_SPATIAL, keys.OBSM_UM):
        places = np.asarray(adata.obsm.get(name))
        numbers = places.dtype.kind in "iuf" and places.shape == (adata.n_obs, 2)
        if not numbers or not np.isfinite(places).all():
            raise ConfigError(
                f"{path}: obsm/{name} is not two finite numbers a spot; remove the file and run "
                "the command that wrote it again"
            )


def write_table(path: Path, adata: anndata.AnnData, rows: Rows | None = None) -> None:
    """Write a table of one slide whole or not at all, in the format that its name says.

    Args:
        path: of `table_path`.
        adata: laid out by `lay_out`; its obs gets two columns for SpatialData.
        rows: gives the matrices block by block, see `preprocessing.hdf5.write_rows`.

    Raises:
        OSError: the disk is full.
    """
    with atomic_path(path) as temporary:
        if path.suffix == keys.TABLES[H5AD]:
            write_h5ad(temporary, adata, rows)
        elif path.name.endswith(keys.TABLES["spatialdata"]):
            _write_spatialdata(temporary, adata, rows)
        else:
            _write_zarr(temporary, adata, rows)


def _write_zarr(folder: Path, adata: anndata.AnnData, rows: Rows | None) -> None:
    zarr = import_module("zarr")
    adata.strings_to_categoricals()
    second = {"zarr_format": 2} if hasattr(zarr.Group, "create_array") else {}  # what all can read
    group = zarr.open_group(str(folder), mode="w", **second)
    anndata.io.write_elem(group, "/", adata)
    if rows is not None:
        write_rows(group, adata.shape, rows)
    zarr.consolidate_metadata(str(folder))


def _write_spatialdata(folder: Path, adata: anndata.AnnData, rows: Rows | None) -> None:
    """Thumbnail, spots, regions and the table that is linked to the spots.

    All are in one coordinate system, "global": level-0 pixels.
    """
    import geopandas
    from shapely import MultiPolygon
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    slide, xy = slide_of(adata), np.asarray(adata.obsm[keys.OBSM_SPATIAL])
    section = adata.uns.get(keys.OBSM_SPATIAL, {}).get(slide)
    elements: dict[str, Any] = {}
    if section is not None:
        down = 1.0 / section["scalefactors"][SCALE]
        elements[f"image_{slide}"] = Image2DModel.parse(
            np.moveaxis(section["images"]["hires"], 2, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={"global": Scale([down, down], axes=("x", "y"))},
        )
    spots = f"spots_{slide}"
    elements[spots] = ShapesModel.parse(
        xy, geometry=0, radius=diameter_of(adata) / 2, index=pd.Index(adata.obs_names)
    )
    for column in region_columns_of(adata):
        region = adata.obs[column].cat
        shapes = region_outlines(xy, region.codes.to_numpy())
        polygons = [MultiPolygon([(one[0], one[1:]) for one in found]) for found in shapes.values()]
        index = pd.Index(region.categories[list(shapes)].astype(str))
        level = column.removeprefix(keys.OBS_REGION)
        frame = geopandas.GeoDataFrame({"geometry": polygons}, index=index)
        elements[f"regions_{level}_{slide}"] = ShapesModel.parse(frame)
    adata.obs[keys.OBS_SHAPES] = pd.Categorical([spots] * adata.n_obs)
    adata.obs[keys.OBS_SPOT] = adata.obs_names.to_numpy()
    linked = {"region": spots, "region_key": keys.OBS_SHAPES, "instance_key": keys.OBS_SPOT}
    elements[IN_SPATIALDATA.name] = TableModel.parse(adata, **linked)
    made = SpatialData.init_from_elements(elements)
    with warnings.catch_warnings():  # of anndata, on what later versions will do by themselves
        warnings.filterwarnings("ignore", "zarr v3 autosharding")
        made.write(folder, consolidate_metadata=False)
    if rows is not None:
        group = import_module("zarr").open_group(folder / IN_SPATIALDATA, mode="r+")
        write_rows(group, adata.shape, rows)
    made.write_consolidated_metadata()


def _require(package: str, extra: str) -> Any:
    """Import what writes a format.

    Raises:
        ConfigError: it is missing; says what to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{package} is missing, which reads and writes this format: "
            f'pip install "hibio[{extra}]", or use --format h5ad'
        ) from error


def slide_of(adata: anndata.AnnData) -> str:
    """The slide of a table."""
    return str(adata.obs[keys.OBS_SLIDE].iloc[0])


def diameter_of(adata: anndata.AnnData) -> float:
    """Diameter of a spot of a table in level-0 pixels: as `lay_out` said, else the distance."""
    section = adata.uns.get(keys.OBSM_SPATIAL, {}).get(slide_of(adata), {})
    said = float(section.get("scalefactors", {}).get(DIAMETER, 0.0))
    return said or _pitch(np.asarray(adata.obsm[keys.OBSM_SPATIAL]))


def region_columns_of(adata: anndata.AnnData) -> list[str]:
    """Columns of obs that name regions, level by level."""
    return [str(name) for name in adata.obs if str(name).startswith(keys.OBS_REGION)]


def lay_out(adata: anndata.AnnData, store: SlideStore) -> None:
    """Put the places of a store's spots and its picture where scanpy and squidpy look for them.

    ``obsm["spatial"]`` is in level-0 pixels, ``obsm["spatial_um"]`` in micrometres, and
    ``obs["slide_id"]`` says the slide where several are joined. ``uns["spatial"][slide]``, of a
    slide with an image, holds the thumbnail, its scale and the diameter of a spot: where none was
    stated, as on a grid of windows, the median distance to the nearest spot.
    """
    adata.obsm[keys.OBSM_SPATIAL], adata.obsm[keys.OBSM_UM] = store.xy_px0, store.xy_um
    adata.obs[keys.OBS_SLIDE] = pd.Categorical([store.slide_id] * store.n_spots)
    if store.thumbnail is None or store.thumbnail_downsample is None:
        return
    factors = {SCALE: 1.0 / store.thumbnail_downsample, **scale_factors(store)}
    factors[DIAMETER] = spot_diameter(store)
    section = {"images": {"hires": store.thumbnail}, "scalefactors": factors}
    adata.uns[keys.OBSM_SPATIAL] = {store.slide_id: section}


def spot_diameter(store: SlideStore) -> float:
    """Diameter of a spot in level-0 pixels: the stated one, else the distance to the next spot."""
    stated = scale_factors(store).get(DIAMETER) or spacing_um(store.xy_px0)
    return float(stated or float(store.attrs["patch_um"]) / store.mpp)


def region_outlines(xy: np.ndarray, code_S: np.ndarray) -> dict[int, list[list[np.ndarray]]]:
    """Polygons of each region: the ground nearer to its spots than to others, near any spot.

    Args:
        xy: (S, 2) in level-0 pixels.
        code_S: (S,) region of each spot, integers from 0.

    Returns:
        Region -> pieces, each its outer ring and then its holes, (n, 2) closed.
    """
    pitch = _pitch(xy)
    low = xy.min(axis=0) - pitch
    size = np.ptp(xy, axis=0) + 2 * pitch
    step = max(pitch / _PER_PITCH, float(np.sqrt(size.prod() / _MOST_PIXELS)))
    across, down = np.ceil(size / step).astype(int)
    x = low[0] + (np.arange(across) + 0.5) * step
    ground = np.full((down, across), -1)
    tree = cKDTree(xy)
    for row in range(down):
        here = np.stack([x, np.full(across, low[1] + (row + 0.5) * step)], axis=1)
        far, nearest = tree.query(here, distance_upper_bound=0.75 * pitch)
        ground[row, np.isfinite(far)] = code_S[nearest[np.isfinite(far)]]
    found = {}
    for code, box in enumerate(ndimage.find_objects(ground + 1)):
        if box is not None:
            corner = low + step * np.array([box[1].start, box[0].start])
            pieces = outlines(ground[box] == code, step)
            found[code] = [[ring + corner for ring in piece] for piece in pieces]
    return found


def _pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest spot, in level-0 pixels; 1 for one spot."""
    return spacing_um(xy) or 1.0


def refuse_folder(out: Path, form: str = H5AD) -> None:
    """Refuse a folder for results, and a format of tables, before any work; nothing is made.

    Args:
        out: the folder.
        form: of the tables that will be written there, one of `keys.TABLES`.

    Raises:
        ConfigError: it is of a model or a run, or the packages that write the format are missing.
    """
    refuse_model_folder(out)
    if form != H5AD:
        _require(*_NEEDS[form])


def open_folder(out: Path, form: str = H5AD) -> None:
    """Make the folder of the results, before any work, and clear it of files of killed runs.

    Raises:
        OSError: it cannot be made.
        ConfigError: see `refuse_folder`, whose arguments these are.
    """
    refuse_folder(out, form)
    out.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)


def require_finite(slide_id: str, values: Mapping[str, np.ndarray]) -> None:
    """Refuse results that are no numbers; nothing of them is written.

    Raises:
        ConfigError: names the slide and the array, and counts the spots.
    """
    for name, array in values.items():
        wrong = int((~np.isfinite(array)).reshape(len(array), -1).any(axis=1).sum())
        if wrong:
            raise ConfigError(
                f"slide {slide_id!r}: {name} of {wrong} of {len(array)} spots are not finite; look "
                "at the store and the checkpoint with `hibio check`"
            )


def hashes_of(path: Path, *more: str) -> dict[str, str] | None:
    """The hashes that a table of ours was made from, and ``more`` of them; None without a table.

    Raises:
        DataError: there is a file or folder that HiBio did not make, or that is damaged.
        ConfigError: it is a folder, and zarr, which reads it, is missing.
    """
    if not path.exists():
        return None
    try:
        with open_table(path) as root:
            uns = root[f"uns/{keys.UNS}"]
            found = {name: _text(uns[name]) for name in HASHES}
            for name in more:
                found[name] = _text(uns[name]) if name in uns else ""
            return found
    except (ConfigError, DataError):
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise not_ours(path) from error


@contextmanager
def open_table(path: Path) -> Iterator[Any]:
    """The group of the AnnData in a table of any format; what a folder says of itself is checked.

    Raises:
        ConfigError: zarr is missing.
        DataError: an array of a folder is not sound.
    """
    if not path.is_dir():
        with open_guarded(path) as file:
            yield file
        return
    zarr = _require(*_NEEDS["zarr"])
    check_arrays(path)
    inner = path / IN_SPATIALDATA
    yield zarr.open_group(inner if inner.is_dir() else path, mode="r")


def _text(scalar: Any) -> str:
    """A text of ``uns``, as HDF5 or zarr gives it."""
    value = scalar[()]
    return value.decode() if isinstance(value, bytes) else str(value)
