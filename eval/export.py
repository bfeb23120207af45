"""What HiBio found, for QuPath (GeoJSON) and TissUUmaps (.tmap): quality, regions, heatmaps.

Places are in pixels of the image's level 0, but in what TissUUmaps reads of regions, which is in
pixels of its picture. Shapes: S spots, R regions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from PIL import Image

from eval.report.figures.canvas import AREAS, SEQUENTIAL
from eval.tables import (
    SCALE,
    diameter_of,
    read_table,
    region_columns_of,
    region_outlines,
    slide_of,
    spot_diameter,
    tables_in,
)
from hibio import keys
from hibio.config.files import ConfigError
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path, not_ours, refuse_others, spreadsheet_text
from preprocessing.qc.figures import FLAG_COLOURS
from preprocessing.qc.slide import slide_quality
from preprocessing.spot_table import SOURCE_COLUMNS
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

MAKER = "hibio"  # in every file, so that no other file is written over
GENE_ID = "gene_id"  # column of var
MOST_COLUMNS = 64  # of a heatmap without names
_CORNERS = 16  # of the polygon of a spot
_NAMESPACE = uuid.UUID("6f0d6b0c-8a55-4a0e-9a53-51c4b1a2d7e4")
_MADE = f'"filename": "{MAKER}: '  # in every project, which may hold nothing but its keys
_UNFLAGGED = {"name": "none", "color": [160, 160, 160]}
_X, _Y, _FLAG = "x_px0", "y_px0", "hibio_flag"  # columns of a table of spots
Feature = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """The thumbnail of a slide: uint8 (h, w, 3), and level-0 pixels a pixel of it."""

    pixels: np.ndarray
    downsample: float
    mpp: float


def export_folder(
    kind: str, data: Path, out: Path, names: Sequence[str] = (), form: str = "geojson"
) -> list[Path]:
    """Write ``<out>/<slide>.<kind>.geojson``, or ``.tmap``, for every slide.

    Args:
        kind: qc, of stores: spots with their measurements, of the class of their flag; regions, of
            files of `hibio embed`: an outline a region and level; heatmap, of files of `embed`,
            `query` or `predict`: spots with values, coloured by the first (2nd to 98th percentile).
        data: a folder of stores or of tables (`eval.tables`), or one of them.
        out: the folder.
        names: genes, gene sets, or columns of numbers in obs for a heatmap; names of levels
            (600um) for regions. All when empty.
        form: geojson, or tmap: a TissUUmaps project with its picture and its spots or regions
            beside it.

    Returns:
        The files written.

    Raises:
        ConfigError: nothing to export, an unknown name, or a file that HiBio did not make.
    """
    if kind == "qc" and names:
        raise ConfigError("quality has no names to choose from; leave --names out")
    written = []
    tables = tables_in(data) if kind != "qc" else stores_in(data)
    for path in tables:
        genes: dict[str, dict[str, str]] = {}
        if kind == "qc":
            slide, picture, features = _quality(path)
        else:
            adata = read_table(path)
            slide = slide_of(adata)
            picture = _picture(adata) if form == "tmap" else None
            features = (region_features if kind == "regions" else heat_features)(adata, names)
            genes = _identifiers(adata, names) if kind == "heatmap" else {}
        target = out / f"{slide}.{kind}.{form}"
        if target in written:
            raise ConfigError(f"{data}: two files of slide {slide!r}; export one kind of file")
        if form == "tmap":
            write_tmap(target, features, picture)
        else:
            write_geojson(target, features, genes)
        written.append(target)
    return written


def _picture(adata: anndata.AnnData) -> Picture | None:
    """The picture of a table; None where somebody took it, or a part of what it needs, out."""
    section = adata.uns.get(keys.OBSM_SPATIAL, {}).get(slide_of(adata), {})
    factors, pixels = section.get("scalefactors", {}), section.get("images", {}).get("hires")
    if pixels is None or not {SCALE, "microns_per_pixel"} <= set(factors):
        return None
    down = 1.0 / factors[SCALE]
    return Picture(pixels, down, down * factors["microns_per_pixel"])


def _quality(path: Path) -> tuple[str, Picture | None, list[Feature]]:
    with SlideStore(path) as store:
        quality = slide_quality(store)
        xy, barcodes = store.xy_px0, store.barcodes
        side, down = spot_diameter(store), store.thumbnail_downsample or 1.0
        small = store.thumbnail
        picture = None if small is None else Picture(small, down, down * store.mpp)
    colours = dict(zip(quality.flags, FLAG_COLOURS, strict=False))
    features = []
    measured = quality.spots.to_dict("list")
    for i, ring in enumerate(circles(xy, side)):
        reasons = [reason for reason, flag in quality.flags.items() if flag.spots[i]]
        kind = {"name": reasons[0], "color": _rgb(colours[reasons[0]])} if reasons else None
        values = {str(name): column[i] for name, column in measured.items()}
        features.append(
            feature(
                ("qc", quality.slide_id, barcodes[i]),
                [[ring]],
                measurements=values,
                classification=kind,
                name=str(barcodes[i]),
            )
        )
    return quality.slide_id, picture, features


def region_features(adata: anndata.AnnData, levels: Sequence[str] = ()) -> list[Feature]:
    """Annotations: every region of every level, of the class of its level and number.

    Raises:
        ConfigError: no regions, or an unknown level.
    """
    there = region_columns_of(adata)
    columns = [keys.OBS_REGION + level for level in levels] or there
    known = ", ".join(name.removeprefix(keys.OBS_REGION) for name in there)
    if not columns or set(columns) - set(there):
        raise ConfigError(f"levels of regions there: {known or 'none'}; `hibio embed` writes them")
    features = []
    xy = np.asarray(adata.obsm[keys.OBSM_SPATIAL])
    for column in columns:
        region = adata.obs[column].cat
        shapes = region_outlines(xy, region.codes.to_numpy())
        level = column.removeprefix(keys.OBS_REGION)
        for code, polygons in shapes.items():
            name = str(region.categories[code])
            features.append(
                feature(
                    ("region", level, name),
                    polygons,
                    kind="annotation",
                    name=name,
                    classification={
                        "name": f"{level} {name}",
                        "color": _rgb(AREAS[code % len(AREAS)]),
                    },
                    measurements={"spots": int((region.codes == code).sum())},
                )
            )
    return features


def heat_features(adata: anndata.AnnData, names: Sequence[str] = ()) -> list[Feature]:
    """Detections: every spot with its values, coloured by the first of them.

    Raises:
        ConfigError: an unknown name, or no names and too many columns.
    """
    names = list(names) or [str(name) for name in adata.var_names]
    if not names or len(names) > MOST_COLUMNS:
        raise ConfigError(
            f"{len(names)} columns; choose at most {MOST_COLUMNS} with --names, such as "
            f"{', '.join(map(str, adata.var_names[:3])) or 'a column of obs'}"
        )
    values = {name: _column(adata, name) for name in names}
    xy = np.asarray(adata.obsm[keys.OBSM_SPATIAL])
    slide = slide_of(adata)
    colours = _heat(next(iter(values.values())))
    return [
        feature(
            ("heatmap", slide, barcode),
            [[ring]],
            name=str(barcode),
            measurements={name: column[i] for name, column in values.items()},
            color=colours[i],
        )
        for i, (ring, barcode) in enumerate(
            zip(circles(xy, diameter_of(adata)), adata.obs_names, strict=True)
        )
    ]


def _column(adata: anndata.AnnData, name: str) -> np.ndarray:
    """Values (S,) of a column of X, or of numbers in obs.

    Raises:
        ConfigError: there is none of this name, or no spot has a value.
    """
    if name not in adata.var_names and (
        name not in adata.obs or adata.obs[name].dtype.kind not in "fiu"
    ):
        there = [*adata.var_names, *adata.obs.select_dtypes("number")]
        near = did_you_mean(name, map(str, there), n=3)
        raise ConfigError(f"{name!r} is no gene, gene set or number of this file{near}")
    table = adata[:, [name]].to_df() if name in adata.var_names else adata.obs
    values = np.asarray(table[name], dtype=np.float64)
    if not np.isfinite(values).any():
        raise ConfigError(
            f"{name!r} is known of no spot of slide {slide_of(adata)!r}; leave it out"
        )
    return values


def _identifiers(adata: anndata.AnnData, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Ids of the genes shown (all when ``names`` is empty), gene -> column of var -> id."""
    columns = [name for name in (GENE_ID, *SOURCE_COLUMNS) if name in adata.var]
    shown = adata.var_names.isin(names) if names else slice(None)
    found = adata.var.loc[shown, columns].astype(str).to_dict("index")
    return {str(gene): ids for gene, ids in found.items() if any(ids.values())}


def _heat(values: np.ndarray) -> list[list[int]]:
    import matplotlib as mpl

    low, high = np.nanpercentile(values, (2, 98)) if np.isfinite(values).any() else (0.0, 1.0)
    share = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    rgba = mpl.colormaps[SEQUENTIAL](np.nan_to_num(share), bytes=True)
    return [[int(one) for one in row[:3]] for row in rgba]


def _rgb(colour: str) -> list[int]:
    return list(bytes.fromhex(colour.removeprefix("#")))


def circles(xy: np.ndarray, diameter: float) -> Iterator[np.ndarray]:
    """Closed rings (n, 2) of spots of one diameter, both in level-0 pixels."""
    angle = np.linspace(0, 2 * np.pi, _CORNERS + 1)
    around = diameter / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    around[-1] = around[0]
    yield from (place + around for place in xy)


def feature(
    identity: Iterable[object],
    polygons: Sequence[Sequence[np.ndarray]],
    *,
    kind: str = "detection",
    measurements: Mapping[str, float],
    **properties: Any,
) -> Feature:
    """One object as QuPath reads it; measurements that are not finite are left out.

    Args:
        identity: what the object is; the same gives the same id in every export.
        polygons: pieces, each its outer ring and then its holes, (n, 2) closed, level-0 pixels.
        kind: detection or annotation.
        measurements: name -> value.
        properties: name, classification and color, as QuPath has them; None is left out.
    """
    pieces = [[ring.round(1).tolist() for ring in piece] for piece in polygons]
    one = len(pieces) == 1
    numbers = {name: float(value) for name, value in measurements.items() if np.isfinite(value)}
    given = {name: value for name, value in properties.items() if value is not None}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, json.dumps([str(part) for part in identity]))),
        "geometry": {
            "type": "Polygon" if one else "MultiPolygon",
            "coordinates": pieces[0] if one else pieces,
        },
        "properties": {"objectType": kind, **given, "measurements": numbers},
    }


def write_geojson(
    path: Path, features: Sequence[Feature], genes: Mapping[str, Mapping[str, str]]
) -> None:
    """Write a FeatureCollection, a feature a line, atomically; ``genes`` says the ids of genes.

    Raises:
        ConfigError: a file that HiBio did not make is in the place.
    """
    head = f'{{"type": "FeatureCollection", "made_by": "{MAKER}", "features": ['
    if path.exists() and not path.read_bytes().startswith(head.encode()):
        raise not_ours(path)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        lines = (json.dumps(one, allow_nan=False) for one in features)
        end = f'], "genes": {json.dumps(genes)}}}' if genes else "]}"
        file.write(head + "\n" + ",\n".join(lines) + f"\n{end}\n")


def write_tmap(path: Path, features: Sequence[Feature], picture: Picture | None) -> None:
    """Write a project of TissUUmaps: ``path``, its picture, and a CSV of spots or their regions.

    Its keys are those of the published schema 1.3 (tissuumaps-schema on PyPI). TissUUmaps counts in
    pixels of the first picture, so spots, whose CSV is in level-0 pixels, get a factor, and regions
    are scaled.

    Raises:
        DataError: a file that HiBio did not make is in the place.
        ConfigError: regions of a slide without a picture, which TissUUmaps cannot place.
    """
    image, spots, regions = (path.with_suffix(end) for end in (".png", ".csv", ".tmap.geojson"))
    refuse_others({path: _MADE}, (image, spots, regions))
    slide, kind = path.stem.rsplit(".", 1)
    project: dict[str, Any] = {"filename": f"{MAKER}: {slide} {kind}", "schemaVersion": "1.3"}
    if picture is not None:
        layer = {"name": slide, "tileSource": f"{image.name}.dzi"}  # which the server makes of it
        project |= {"layers": [layer], "mpp": picture.mpp}
    elif kind == "regions":
        raise ConfigError(
            f"slide {slide!r} has no picture, and TissUUmaps places regions on one; use --format "
            "geojson, or prepare the slide with its image"
        )
    scale = 1.0 / picture.downsample if picture is not None else 1.0
    if kind == "regions":
        shown = {"title": "regions", "path": regions.name, "autoLoad": True}
        project["regionFiles"] = [shown]
    else:
        frame = _spot_table(features)
        project["markerFiles"] = _marker_files(frame, features, kind, spots.name, scale)
    with atomic_path(path) as temporary:  # first: it says who made the others
        temporary.write_text(json.dumps(project, indent=1, allow_nan=False), encoding="utf-8")
    if picture is not None:
        with atomic_path(image) as temporary:
            Image.fromarray(picture.pixels).save(temporary)
    if kind == "regions":
        write_geojson(regions, [_scaled(one, scale) for one in features], {})
    else:
        with atomic_path(spots) as temporary:
            frame.to_csv(temporary, index=False)


def _spot_table(features: Sequence[Feature]) -> pd.DataFrame:
    """Place (level-0 pixels), name, class and values of spots."""
    rings = np.array([one["geometry"]["coordinates"][0] for one in features])
    told = [one["properties"] for one in features]
    values = pd.DataFrame([one["measurements"] for one in told])
    x, y = rings[:, :-1].mean(axis=1).T
    names = [spreadsheet_text(one["name"]) for one in told]
    flags = [one.get("classification", _UNFLAGGED)["name"] for one in told]
    about = pd.DataFrame({_X: x, _Y: y, keys.OBS_SPOT: names, _FLAG: flags})
    return about.join(values.rename(columns=spreadsheet_text))


def _marker_files(
    frame: pd.DataFrame, features: Sequence[Feature], kind: str, path: str, scale: float
) -> list[dict[str, Any]]:
    """What TissUUmaps shows of a table of spots: flags, or the first value; then any value."""
    header = {"X": _X, "Y": _Y, "coord_factor": scale, "shape_fixed": "disc"}
    fixed = {"shape_gr": False, "shape_gr_rand": False, "shape_fixed": True}
    by_value = {**fixed, "cb_col": True, "cb_gr": False, "cb_gr_rand": False, "cb_gr_key": False}
    values = [str(name) for name in frame.columns[4:]]
    valued = {**header, "cb_col": values[0], "cb_cmap": "interpolateViridis"}
    choices = [{"optionName": v, "name": v, "expectedHeader.cb_col": v} for v in values]
    several = {"title": "values", "uid": "values", "path": path, "dropdownOptions": choices}
    if kind == "qc":
        classes = [one["properties"].get("classification", _UNFLAGGED) for one in features]
        colours = {one["name"]: f"#{bytes(one['color']).hex()}" for one in classes}
        flags = {**header, "gb_col": _FLAG, "cb_gr_dict": json.dumps(colours)}
        by_flag = {**fixed, "cb_gr": True, "cb_gr_dict": True, "cb_gr_key": False}
        first = {"title": "flags", "expectedHeader": flags, "expectedRadios": by_flag}
    else:
        first = {"title": values[0], "expectedHeader": valued, "expectedRadios": by_value}
    return [
        {**first, "name": first["title"], "uid": "first", "path": path, "autoLoad": True},
        {**several, "expectedHeader": valued, "expectedRadios": by_value},
    ]


def _scaled(one: Feature, scale: float) -> Feature:
    """A feature in other pixels."""

    def moved(part: Any) -> Any:
        return [moved(p) for p in part] if isinstance(part, list) else round(part * scale, 3)

    geometry = {**one["geometry"], "coordinates": moved(one["geometry"]["coordinates"])}
    return {**one, "geometry": geometry}
