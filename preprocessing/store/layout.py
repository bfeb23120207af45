"""The layout of a slide store: every HDF5 path and attribute, once, and how values are encoded.

The counts, strings and arrays follow the AnnData on-disk format, so that other tools read them.
"""

import io
import json
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from PIL import Image

from preprocessing.errors import DataError
from preprocessing.plain_names import require_plain_name

SCHEMA_VERSION = 1
COUNTS = "counts"
GENE_ID, GENE_NAME = "genes/id", "genes/name"
BARCODE, XY_PX0, XY_UM = "spots/barcode", "spots/xy_px0", "spots/xy_um"
TISSUE_FRACTION, LABELS = "spots/tissue_fraction", "spots/label"
PATCHES, CONTEXT = "patches", "context"  # groups of pictures: of a spot, and of its surroundings
BYTES, START, SIZE = "bytes", "start", "size"  # in each of these groups
ABSENT = {  # what to tell who asks for a group that is not there
    PATCHES: "patches (counts only); give an image in the manifest and prepare the slide again",
    CONTEXT: "context patches; prepare the slide again with --context-um UM",
}
FEATURES, THUMBNAIL = "features", "thumbnail"
REQUIRED = (COUNTS, GENE_ID, GENE_NAME, BARCODE, XY_PX0, XY_UM, TISSUE_FRACTION, LABELS)
JSON_ATTRS = ("source_sha256", "settings", "dropped", "notes")
COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 2, "shuffle": True}

_JPEG_QUALITY = 90
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def write_strings(file: h5py.Group, path: str, values: np.ndarray) -> h5py.Dataset:
    """Write (n,) strings as an AnnData string array."""
    data = file.create_dataset(path, data=[str(v) for v in values], dtype=h5py.string_dtype())
    data.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return data


def read_strings(file: h5py.Group, path: str) -> np.ndarray:
    """Read strings, (n,) object array of str."""
    return np.array(file[path].asstr()[:], dtype=object)


def write_array(file: h5py.Group, path: str, values: np.ndarray) -> h5py.Dataset:
    """Write numbers as an AnnData array."""
    data = file.create_dataset(path, data=values)
    data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return data


def write_features(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Write features (S, F): float16, or float32 when a value exceeds the float16 range.

    Raises:
        DataError: the name is no plain name, or a value is not finite.
    """
    require_plain_name("feature name", name)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise DataError(
            f"features {name!r} of shape {values.shape} must be (spots, features), all finite"
        )
    narrow = values.size == 0 or float(np.abs(values).max()) <= _FLOAT16_MAX
    dtype = np.float16 if narrow else np.float32
    write_array(file, f"{FEATURES}/{name}", values.astype(dtype))


def write_label(file: h5py.File, position: int, column: str, values: np.ndarray) -> None:
    """Write one label column (S,): numbers as float64, others as strings."""
    name = column.replace("/", "_")
    if name in ("", ".", "..") or f"{LABELS}/{name}" in file:
        name = f"column_{position}"
    path = f"{LABELS}/{name}"
    if values.dtype.kind in "fiub":
        data = write_array(file, path, values.astype(np.float64))
    else:
        data = write_strings(file, path, values)
    data.attrs.update({"name": column, "position": position})


def read_labels(file: h5py.File) -> dict[str, np.ndarray]:
    """Read the label columns in their order, name -> (S,) float64 or object."""
    group = file[LABELS]
    columns = sorted(group, key=lambda key: int(group[key].attrs["position"]))
    return {
        str(group[key].attrs["name"]): (
            read_strings(group, key) if h5py.check_string_dtype(group[key].dtype) else group[key][:]
        )
        for key in columns
    }


def encode_jpeg(picture: np.ndarray) -> bytes:
    """Encode uint8 (h, w, 3) as JPEG of quality 90 without colour subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(data: np.ndarray) -> np.ndarray:
    """Decode JPEG bytes, uint8 (n,) -> uint8 (h, w, 3).

    Raises:
        OSError: damaged bytes.
    """
    with Image.open(io.BytesIO(data.tobytes()), formats=("JPEG",)) as picture:
        return np.asarray(picture.convert("RGB"))


def _decode_raw(data: np.ndarray) -> np.ndarray:
    side = round((data.size / 3) ** 0.5)
    return data.reshape(side, side, 3)


def _encode_raw(patch: np.ndarray) -> bytes:
    return np.ascontiguousarray(patch).tobytes()


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"jpeg": encode_jpeg, "raw": _encode_raw}
DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"jpeg": decode_jpeg, "raw": _decode_raw}


def read_attrs(file: h5py.File) -> dict[str, Any]:
    """Read the attributes of a store as plain Python values."""
    values: dict[str, Any] = {}
    for key, value in file.attrs.items():
        plain = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        values[key] = json.loads(plain) if key in JSON_ATTRS else plain
    return values
