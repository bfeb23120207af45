"""Writing a slide store: one HDF5 file a slide, complete or absent; and adding features to one.

For new features the store is copied beside itself, the copy gets them, is forced to disk and takes
its name. A process killed at any moment leaves the old store or the new one, nothing between.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.errors import DataError
from preprocessing.files import atomic_path
from preprocessing.hdf5 import Sink, hdf5_writer
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import layout
from preprocessing.store.layout import bytes_digest, seal, seal_dataset, write_counts
from preprocessing.store.read import SlideStore

_BUFFER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 18
_ORIGIN = "origin"  # attribute of a feature set
_ATTEMPTS = 5  # to copy a store that others exchange meanwhile
RESERVED = ("patches",)  # no name of a feature set: a configuration means the patches by it


@dataclass(frozen=True)
class SlidePicture:
    """The slide as a whole, for reports and checks.

    Attributes:
        size_px0: (width, height) of the image in level-0 pixels.
        thumbnail: uint8 (h, w, 3), at most 1024 px.
        downsample: level-0 pixels per thumbnail pixel.
        left_out_px0: (O, 2) centres of the spots left out as off tissue; they tell where the
            array was thought to lie.
        correction: what `hibio prepare --fix-registration` did to the places, as the manifest
            column image_transform says it; "" nothing.
    """

    size_px0: tuple[int, int]
    thumbnail: np.ndarray
    downsample: float
    left_out_px0: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    correction: str = ""


def write_store(
    path: str | Path,
    table: SpotTable,
    row: SlideRow,
    *,
    patches: Iterable[tuple[int, np.ndarray]] | None,
    patch: PatchConfig,
    context: Iterable[tuple[int, np.ndarray]] | None = None,
    features: Mapping[str, np.ndarray] | None = None,
    tissue_fraction: np.ndarray | None = None,
    source_sha256: Mapping[str, str] | None = None,
    encoding: str = "jpeg",
    picture: SlidePicture | None = None,
    settings: Mapping[str, Any] | None = None,
    dropped: Mapping[str, int] | None = None,
) -> None:
    """Write one store atomically: after an error or a kill there is no new file.

    Args:
        path: ``<slide_id>.h5``.
        table: the spots, in the order to keep.
        row: ids and free text of the slide.
        patches: (spot index, uint8 (px, px, 3)) of every spot once, in any order; None without
            image. May be a generator: one patch is held at a time.
        patch: size of the patches, and width of the context if there is one.
        context: the same of the spots' surroundings, ``patch.context_um`` wide; None without.
        features: name -> (S, F); written as float16 where the range allows.
        tissue_fraction: (S,) part of each patch that is tissue; None without image.
        source_sha256: role -> SHA-256 of each source file.
        encoding: "jpeg" (quality 90) or "raw".
        picture: the slide as a whole; None without image.
        settings: what else the content depends on (compared when preparing again).
        dropped: reason -> number of spots left out.

    Raises:
        DataError: patches or features do not fit the spots, or the context is not what patch says.
    """
    if encoding not in layout.ENCODERS:
        raise DataError(f"encoding {encoding!r} is unknown; choose {' or '.join(layout.ENCODERS)}")
    documents = {
        "source_sha256": dict(source_sha256 or {}),
        "settings": dict(settings or {}),
        "dropped": dict(dropped or {}),
        "notes": list(table.notes),
        "warnings": list(table.warnings),
    }
    _without_nul(row, table)
    _check_context(patch, patches is not None, context is not None)
    with atomic_path(Path(path)) as temporary, hdf5_writer(temporary) as (file, sink):
        file.attrs.update(_attrs(table, row, patch, encoding, patches is not None))
        file.attrs.update({k: json.dumps(v, sort_keys=True) for k, v in documents.items()})
        _write_spots(file, table, tissue_fraction)
        _write_features(file, features or {}, table.n_spots)
        for group, pictures in ((layout.PATCHES, patches), (layout.CONTEXT, context)):
            if pictures is not None:
                checked = _until_full(pictures, sink)
                _write_patches(file, group, checked, table.n_spots, patch.patch_px, encoding)
        if picture is not None:
            _write_picture(file, picture)
        seal(file)


def _without_nul(row: SlideRow, table: SpotTable) -> None:
    """Refuse texts that HDF5 cannot hold."""
    texts: dict[str, Iterable[Any]] = {
        "manifest row": [v for v in vars(row).values() if isinstance(v, str)],
        "gene ids": table.gene_ids,
        "gene names": table.gene_names,
        "barcodes": table.barcodes,
        "names of the label columns": table.labels.columns,
    }
    texts |= {
        f"labels {name!r}": values
        for name, values in table.labels.items()
        if values.dtype.kind not in "fiub"
    }
    for what, values in texts.items():
        bad = [str(v) for v in values if "\0" in str(v)]
        if bad:
            raise DataError(f"{what}: {bad[0][:80]!r} holds a NUL character; take it out")


def _check_context(patch: PatchConfig, patches: bool, context: bool) -> None:
    """Refuse context patches without patches or width, and a width without them."""
    if context != (patches and patch.context_um is not None):
        found = "they are" if context else "none are"
        raise DataError(
            f"context patches: context_um is {patch.context_um} and {found} given; give both, "
            "with patches of the spots, or neither"
        )


def _attrs(
    table: SpotTable, row: SlideRow, patch: PatchConfig, encoding: str, has_image: bool
) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if has_image and patch.context_um is not None:
        more["context_um"] = patch.context_um
    if table.image_transform is not None:
        more[layout.IMAGE_TRANSFORM] = json.dumps(table.image_transform.tolist())
    return more | {
        "schema_version": layout.SCHEMA_VERSION,
        "slide_id": row.slide_id,
        "patient_id": row.patient_id,
        "organism": row.organism,
        "tissue": row.tissue,
        "technology": row.technology,
        "modality": table.modality,
        "outcome": row.outcome,
        "role": row.role,
        "mpp": table.mpp,
        "diameter_um": np.nan if table.diameter_um is None else table.diameter_um,
        "patch_um": patch.um,
        "patch_px": patch.patch_px,
        "patch_encoding": encoding,
        "has_image": has_image,
    }


def _write_spots(file: h5py.File, table: SpotTable, tissue_fraction: np.ndarray | None) -> None:
    write_counts(file, table.counts)
    layout.write_strings(file, layout.GENE_ID, table.gene_ids)
    layout.write_strings(file, layout.GENE_NAME, table.gene_names)
    for name, texts in table.gene_sources.items():
        layout.write_strings(file, layout.GENE_SOURCES[name], texts)
    layout.write_strings(file, layout.BARCODE, table.barcodes)
    layout.write_array(file, layout.XY_PX0, table.xy_px0)
    layout.write_array(file, layout.XY_UM, table.xy_um)
    fraction = np.full(table.n_spots, np.nan) if tissue_fraction is None else tissue_fraction
    if len(fraction) != table.n_spots:
        raise DataError(f"tissue_fraction has {len(fraction)} values for {table.n_spots} spots")
    layout.write_array(file, layout.TISSUE_FRACTION, np.asarray(fraction, dtype=np.float32))
    file.create_group(layout.LABELS)
    for position, column in enumerate(table.labels.columns):
        layout.write_label(file, position, str(column), table.labels[column].to_numpy())


def _write_features(file: h5py.File, features: Mapping[str, np.ndarray], spots: int) -> None:
    for name, values in features.items():
        if len(values) != spots:
            raise DataError(f"features {name!r} have {len(values)} rows, the slide {spots} spots")
        layout.write_features(file, name, np.asarray(values))


def _until_full(
    patches: Iterable[tuple[int, np.ndarray]], sink: Sink
) -> Iterator[tuple[int, np.ndarray]]:
    """The patches, until the disk is full."""
    for patch in patches:
        sink.check()
        yield patch


def _write_patches(
    file: h5py.File,
    group: str,
    patches: Iterable[tuple[int, np.ndarray]],
    spots: int,
    px: int,
    encoding: str,
) -> None:
    """Write a group of patches one behind the other; ``start``, ``size`` (S,): where each lies."""
    encode = layout.ENCODERS[encoding]
    start, size = np.full(spots, -1, dtype=np.int64), np.zeros(spots, dtype=np.int64)
    name = f"{group}/{layout.BYTES}"
    if encoding == "raw":  # of known size, so in one piece: that is read fastest
        data = file.create_dataset(name, (spots * px * px * 3,), np.uint8)
    else:
        data = file.create_dataset(name, (0,), np.uint8, maxshape=(None,), chunks=(_CHUNK_BYTES,))
    end = 0
    buffer, digest = bytearray(), bytes_digest()
    for index, patch in patches:
        if patch.shape != (px, px, 3) or patch.dtype != np.uint8:
            raise DataError(
                f"{group}: spot {index} has {patch.dtype} {patch.shape}; expected uint8 {px, px, 3}"
            )
        if start[index] >= 0:
            raise DataError(f"{group}: spot {index} got two patches; expected one each")
        encoded = encode(patch)
        start[index], size[index] = end, len(encoded)
        end += len(encoded)
        buffer += encoded
        digest.update(encoded)
        if len(buffer) >= _BUFFER_BYTES:
            _append(data, end - len(buffer), buffer)
            buffer.clear()
    _append(data, end - len(buffer), buffer)
    seal_dataset(data, digest.hexdigest())
    if (start < 0).any():
        missing = f"{int((start < 0).sum())} of {spots} spots"
        raise DataError(f"{group}: {missing} got no patch; expected one each")
    layout.write_array(file, f"{group}/{layout.START}", start)
    layout.write_array(file, f"{group}/{layout.SIZE}", size)


def _append(data: h5py.Dataset, start: int, buffer: bytearray) -> None:
    if data.chunks is not None:
        data.resize((start + len(buffer),))
    data[start : start + len(buffer)] = np.frombuffer(bytes(buffer), dtype=np.uint8)


def _write_picture(file: h5py.File, picture: SlidePicture) -> None:
    encoded = np.frombuffer(layout.encode_jpeg(picture.thumbnail), dtype=np.uint8)
    data = file.create_dataset(layout.THUMBNAIL, data=encoded)
    data.attrs["downsample"] = float(picture.downsample)
    file.attrs["slide_size_px0"] = np.array(picture.size_px0, dtype=np.int64)
    if len(picture.left_out_px0):
        layout.write_array(file, layout.LEFT_OUT, picture.left_out_px0.astype(np.float64))
    if picture.correction:
        file.attrs[layout.CORRECTION] = picture.correction


def say_anew(path: str | Path, said: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Write other columns of `slide_row.SAID` into a store, atomically; the rest stays as it is.

    Args:
        path: a store of this schema.
        said: column -> its text.
        settings: what the content was made with, the new columns included.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        shutil.copyfile(path, temporary)
        with hdf5_writer(temporary, change=True) as (file, _):
            file.attrs.update({**said, "settings": json.dumps(dict(settings), sort_keys=True)})
            if layout.SEAL in file.attrs:
                seal(file)


class _StoreChangedError(Exception):
    """Another process exchanged the store while it was copied."""


def add_features(
    path: str | Path, name: str, values: np.ndarray, origin: Mapping[str, Any] | None = None
) -> None:
    """Add or replace one feature set of a store, atomically.

    Needs free space for one more copy of the store. When another process exchanges the store in
    the meantime (it adds other features), the new one is copied instead, so nothing is lost.

    Args:
        path: the store.
        name: plain name; a configuration reads it as ``data.image: <name>``.
        values: (S, F), finite; kept as float16 (float32 when a value exceeds its range).
        origin: where the features come from: plain values, kept as one JSON attribute.

    Raises:
        DataError: not a store, another number of rows, a bad name, or values that are not finite.
        OSError: the disk is full or not writable; the store is unchanged.
    """
    path = Path(path)
    if name in RESERVED:
        raise DataError(f"feature name {name!r} means the patches themselves; take another name")
    with SlideStore(path) as store:
        spots = store.n_spots
    if len(values) != spots:
        raise DataError(f"{path}: {len(values)} rows of features for {spots} spots")
    text = json.dumps(dict(origin or {}), sort_keys=True)
    for _ in range(_ATTEMPTS):
        try:
            _exchange(path, name, values, text)
        except _StoreChangedError:
            continue
        return
    raise DataError(f"{path} is written by others all the time; stop them and run again")


def _exchange(path: Path, name: str, values: np.ndarray, origin: str) -> None:
    before = _state(path)
    with atomic_path(path) as temporary:
        shutil.copyfile(path, temporary)
        with hdf5_writer(temporary, change=True) as (file, _):
            if f"{layout.FEATURES}/{name}" in file:
                del file[f"{layout.FEATURES}/{name}"]
            data = layout.write_features(file, name, np.asarray(values))
            data.attrs[_ORIGIN] = origin
            seal_dataset(data)
        if _state(path) != before:
            raise _StoreChangedError


def _state(path: Path) -> tuple[int, int, int]:
    """What differs between two files that had the same name one after the other."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def feature_origin(path: str | Path, name: str) -> dict[str, Any] | None:
    """Where a feature set comes from, as given to `add_features`; empty when that was not kept.

    None when the store has no such features.
    """
    with SlideStore(path) as store:
        if name not in store.feature_names:
            return None
    with h5py.File(path, "r") as file:
        text = file[f"{layout.FEATURES}/{name}"].attrs.get(_ORIGIN, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}
