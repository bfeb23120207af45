"""What HiBio found, as GeoJSON that QuPath opens over the slide: quality, regions, heatmaps.

Every place is in pixels of the image's level 0. Shapes: S spots, R regions.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from eval.embed import spot_diameter
from eval.report.figures.canvas import AREAS, SEQUENTIAL
from hibio import keys
from hibio.config.files import ConfigError
from preprocessing.files import atomic_path, files_in, not_ours
from preprocessing.hest_layout import DIAMETER, outlines
from preprocessing.qc.figures import FLAG_COLOURS
from preprocessing.qc.slide import slide_quality
from preprocessing.scale import spacing_um
from preprocessing.spot_table import SOURCE_COLUMNS
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

MAKER = "hibio"  # in every file, so that no other file is written over
GENE_ID = "gene_id"  # column of var
MOST_COLUMNS = 64  # of a heatmap without names
_CORNERS = 16  # of the polygon of a spot
_PER_PITCH = 6  # pixels of the ground on which a region is outlined, a distance of spots
_MOST_PIXELS = 1 << 24  # of that ground
_NAMESPACE = uuid.UUID("6f0d6b0c-8a55-4a0e-9a53-51c4b1a2d7e4")
Feature = dict[str, Any]


def export_folder(kind: str, data: Path, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write ``<out>/<slide>.<kind>.geojson`` for every slide.

    Args:
        kind: qc, of stores: spots with their measurements, of the class of their flag; regions, of
            files of `hibio embed`: an outline a region and level; heatmap, of files of `embed`,
            `query` or `predict`: spots with values, coloured by the first (2nd to 98th percentile).
        data: a folder of stores or of .h5ad files, or one of them.
        out: the folder.
        names: genes, gene sets, or columns of numbers in obs for a heatmap; names of levels
            (600um) for regions. All when empty.

    Returns:
        The files written.

    Raises:
        ConfigError: nothing to export, an unknown name, or a file that HiBio did not make.
    """
    if kind == "qc" and names:
        raise ConfigError("quality has no names to choose from; leave --names out")
    written = []
    tables = _tables(data) if kind != "qc" else stores_in(data)
    for path in tables:
        genes: dict[str, dict[str, str]] = {}
        if kind == "qc":
            slide, features = _quality(path)
        else:
            adata = _read(path)
            slide = str(adata.obs[keys.OBS_SLIDE].iloc[0])
            features = (region_features if kind == "regions" else heat_features)(adata, names)
            genes = _identifiers(adata, names) if kind == "heatmap" else {}
        target = out / f"{slide}.{kind}.geojson"
        if target in written:
            raise ConfigError(f"{data}: two files of slide {slide!r}; export one kind of file")
        write_geojson(target, features, genes)
        written.append(target)
    return written


def _tables(data: Path) -> list[Path]:
    found = [data] if data.is_file() else files_in(data, "*.h5ad")
    if not found:
        raise ConfigError(f"{data}: no .h5ad file there; give what `hibio embed` or `query` wrote")
    return found


def _read(path: Path) -> anndata.AnnData:
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as AnnData ({error})") from error
    if keys.UNS not in adata.uns:
        raise ConfigError(f"{path} was not made by HiBio; give what `hibio embed` or `query` wrote")
    if keys.OBSM_UM not in adata.obsm or keys.OBS_SLIDE not in adata.obs:
        raise ConfigError(f"{path}: of an older HiBio, without pixels; run the command again")
    return adata


def _quality(path: Path) -> tuple[str, list[Feature]]:
    with SlideStore(path) as store:
        quality = slide_quality(store)
        xy, barcodes = store.xy_px0, store.barcodes
        side = spot_diameter(store)
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
    return quality.slide_id, features


def region_features(adata: anndata.AnnData, levels: Sequence[str] = ()) -> list[Feature]:
    """Annotations: every region of every level, of the class of its level and number.

    Raises:
        ConfigError: no regions, or an unknown level.
    """
    there = [name for name in adata.obs if str(name).startswith(keys.OBS_REGION)]
    columns = [keys.OBS_REGION + level for level in levels] or there
    known = ", ".join(str(name).removeprefix(keys.OBS_REGION) for name in there)
    if not columns or set(columns) - set(there):
        raise ConfigError(f"levels of regions there: {known or 'none'}; `hibio embed` writes them")
    features = []
    xy = np.asarray(adata.obsm[keys.OBSM_SPATIAL])
    for column in columns:
        region = adata.obs[column].cat
        shapes = region_outlines(xy, region.codes.to_numpy())
        level = str(column).removeprefix(keys.OBS_REGION)
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
    slide = str(adata.obs[keys.OBS_SLIDE].iloc[0])
    section = adata.uns.get(keys.OBSM_SPATIAL, {}).get(slide, {"scalefactors": {}})
    side = float(section["scalefactors"].get(DIAMETER, 0.0)) or _pitch(xy)
    colours = _heat(next(iter(values.values())))
    return [
        feature(
            ("heatmap", slide, barcode),
            [[ring]],
            name=str(barcode),
            measurements={name: column[i] for name, column in values.items()},
            color=colours[i],
        )
        for i, (ring, barcode) in enumerate(zip(circles(xy, side), adata.obs_names, strict=True))
    ]


def _column(adata: anndata.AnnData, name: str) -> np.ndarray:
    """Values (S,) of a column of X, or of numbers in obs."""
    if name not in adata.var_names and (
        name not in adata.obs or adata.obs[name].dtype.kind not in "fiu"
    ):
        raise ConfigError(f"{name!r} is no gene, gene set or number of this file")
    return np.asarray(adata.obs_vector(name), dtype=np.float64)


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


def _pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest spot, in level-0 pixels; 1 for one spot."""
    return spacing_um(xy) or 1.0


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
