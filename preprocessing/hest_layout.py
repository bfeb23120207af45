"""Slide stores written as samples of HEST-1k, for tools that read these folders."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.measure import find_contours

from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.hdf5 import hdf5_writer
from preprocessing.readers.hest import METADATA, OWN, PATCHES, ST
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.tissue import tissue_pixels

TISSUE = "tissue_seg"
DIAMETER = "spot_diameter_fullres"  # Space Ranger's name of a spot's diameter in level-0 pixels
_BLOCK = 256  # patches in memory at once
_REFUSED = re.compile(r"[^\w.-]")  # in names of columns, by AnnData and SpatialData
_PX, _UM = 224, 112.0  # what HEST-1k cuts


@dataclass(frozen=True)
class HestSample:
    """What was written of one slide: its spots, its patches, and what is not as in HEST-1k."""

    slide_id: str
    n_spots: int
    n_patches: int
    notes: tuple[str, ...] = ()


def write_hest(stores: str | Path, out: str | Path) -> list[HestSample]:
    """Write every store of a folder as a sample of HEST-1k.

    Each file is complete or absent. Slide images are not part of a store: link them as
    wsis/<id>.tif yourself. Samples that are there are written anew.

    Args:
        stores: folder that `hibio prepare` wrote, or one store.
        out: root of the new folder: st/, patches/, tissue_seg/, metadata/.

    Returns:
        One entry a slide; ``notes`` say what differs (patches of another size, no counts).

    Raises:
        DataError: no store, or a damaged one.
    """
    stores, out = Path(stores), Path(out)
    paths = stores_in(stores)
    return [_write_sample(path, out) for path in paths]


def _write_sample(path: Path, out: Path) -> HestSample:
    with SlideStore(path) as store:
        notes = []
        if store.slide_id in ("", ".", "..") or "/" in store.slide_id:
            raise DataError(f"{path}: slide_id {store.slide_id!r} is no name of a file")
        if store.has_image:
            _write_patches(store, out / PATCHES / f"{store.slide_id}.h5")
            size = f"{store.attrs['patch_px']} px of {store.attrs['patch_um']:g} um"
            if (store.attrs["patch_px"], store.attrs["patch_um"]) != (_PX, _UM):
                notes.append(f"patches are {size}, HEST-1k has {_PX} px of {_UM:g} um")
        if store.thumbnail is not None and store.thumbnail_downsample is not None:
            contours = tissue_contours(store.thumbnail, store.thumbnail_downsample)
            _write_json(out / TISSUE / f"{store.slide_id}_contours.geojson", contours)
        if store.has_counts:
            _write_counts(store, out / ST / f"{store.slide_id}.h5ad")
        else:
            notes.append(f"nothing was counted, so there is no {ST}/{store.slide_id}.h5ad")
        _write_json(out / METADATA / f"{store.slide_id}.json", _metadata(store))
        return HestSample(store.slide_id, store.n_spots, store.n_patches, tuple(notes))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def tissue_contours(small: np.ndarray, downsample: float) -> dict[str, Any]:
    """Outlines of the tissue of a thumbnail, as HEST-1k has them: one polygon a piece, with holes.

    Args:
        small: thumbnail (h, w, 3) uint8; its tissue is that of `preprocessing.tissue`.
        downsample: level-0 pixels per thumbnail pixel.

    Returns:
        GeoJSON; rings of (x, y) in level-0 pixels, the outer one first; tissue_id counts from 0.
    """
    features = []
    for piece, rings in enumerate(outlines(tissue_pixels(small)[0], downsample)):
        polygon = {"type": "Polygon", "coordinates": [ring.round(2).tolist() for ring in rings]}
        properties = {"tissue_id": piece}
        features.append({"type": "Feature", "properties": properties, "geometry": polygon})
    return {"type": "FeatureCollection", "features": features}


def outlines(mask: np.ndarray, downsample: float) -> Iterator[list[np.ndarray]]:
    """The pieces of a mask (h, w): of each its outer ring and then its holes.

    Rings are closed, (n, 2) as (x, y), ``downsample`` a pixel of the mask; of a straight line they
    hold the ends.
    """
    pieces, _ = ndimage.label(mask)
    for piece, box in enumerate(ndimage.find_objects(pieces)):
        # of a padded pixel (r, c) the centre lies at (r - 1 + 0.5) pixels of the box
        alone = np.pad(pieces[box] == piece + 1, 1).astype(np.float64)
        corner = np.array([box[1].start, box[0].start]) - 0.5
        rings = []
        for ring in find_contours(alone, 0.5):  # type: ignore[no-untyped-call]
            turns = np.diff(ring, 2, axis=0).any(axis=1)
            rings.append((ring[np.r_[True, turns, True], ::-1] + corner) * downsample)
        yield sorted(rings, key=lambda ring: -float(np.ptp(ring, axis=0).prod()))


def obs_columns(labels: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A name of a column for each label (or class of one), column -> label, in their order.

    Names are those that AnnData and SpatialData allow: letters, digits, "_", "-" and ".", none
    twice in whatever case, nor one in ``taken``.
    """
    columns: dict[str, str] = {}
    used = {name.lower() for name in taken}
    for label in labels:
        column = _REFUSED.sub("_", label.strip()).replace("_index", "index")
        column = column.lstrip("_") if column.startswith("__") else column
        column = column if column.strip(".") else "label"
        while column.lower() in used:
            column += "_"
        used.add(column.lower())
        columns[column] = label
    return columns


def scale_factors(store: SlideStore) -> dict[str, float]:
    """What Space Ranger says of a slide: micrometres a level-0 pixel, a spot's diameter in pixels.

    The diameter is left out where the source did not state one.
    """
    factors = {"microns_per_pixel": store.mpp}
    if np.isfinite(store.attrs["diameter_um"]):
        factors[DIAMETER] = store.attrs["diameter_um"] / store.mpp
    return factors


def _write_counts(store: SlideStore, path: Path) -> None:
    columns = {label: name for name, label in obs_columns(store.label_columns()).items()}
    obs = store.labels().rename(columns=columns)
    obs = obs.set_axis(pd.Index(store.barcodes.astype(str)), axis=0)
    data = anndata.AnnData(store.counts(), obs=obs, var=store.genes("gene_ids"))
    data.obsm["spatial"] = store.xy_px0
    factors, images = scale_factors(store), {}
    if store.thumbnail is not None and store.thumbnail_downsample is not None:
        images["downscaled_fullres"] = store.thumbnail
        factors["tissue_downscaled_fullres_scalef"] = 1.0 / store.thumbnail_downsample
    data.uns["spatial"] = {"ST": {"images": images, "scalefactors": factors}}
    with atomic_path(path) as temporary:
        data.write_h5ad(temporary, compression="gzip")


def _write_patches(store: SlideStore, path: Path) -> None:
    count, px = store.n_spots, int(store.attrs["patch_px"])
    side = float(store.attrs["patch_um"]) / store.mpp
    with atomic_path(path) as temporary, hdf5_writer(temporary) as (file, _):
        images = file.create_dataset("img", (count, px, px, 3), np.uint8, chunks=(1, px, px, 3))
        for first in range(0, count, _BLOCK):
            rows = np.arange(first, min(count, first + _BLOCK))
            images[first : first + len(rows)] = store.patches(rows)
        file["coords"] = np.rint(store.xy_px0 - side / 2).astype(np.int64)
        scale = {
            "patch_size": px,
            "patch_size_target": px,
            "patch_size_src": side,
            "downsample": side / px,
            "pixel_size": store.mpp,
            "name": store.slide_id,
        }
        for node in (images, file["coords"]):  # tools read either
            node.attrs.update(scale)
        names = [str(name).encode() for name in store.barcodes]
        file["barcode"] = np.array(names)[:, None]


def _metadata(store: SlideStore) -> dict[str, Any]:
    attrs = store.attrs
    width, height = attrs.get("slide_size_px0", (None, None))
    diameter = attrs["diameter_um"]
    return {
        "id": store.slide_id,
        "patient": store.patient_id,
        "species": attrs["organism"] or None,
        "tissue": attrs["tissue"] or None,
        "organ": attrs["tissue"] or None,
        "st_technology": attrs["technology"] or None,
        "pixel_size_um_estimated": store.mpp,
        "pixel_size_um_embedded": None,
        "fullres_px_width": width,
        "fullres_px_height": height,
        "spots_under_tissue": store.n_spots,
        "nb_genes": len(store.gene_names),
        "spot_diameter": diameter if np.isfinite(diameter) else None,
        OWN: {
            "labels": obs_columns(store.label_columns()),
            "modality": store.modality,
            "outcome": store.outcome,
            "role": store.role,
            "store_sha256": store.sha256,
        },
    }
