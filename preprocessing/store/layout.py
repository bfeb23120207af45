"""The layout of a slide store: paths, attributes, how values are encoded, checksums.

The counts, strings and arrays follow the AnnData on-disk format, so that other tools read them.
Every dataset carries the SHA-256 of its type, shape and values as the attribute "sha256". One more
over all of these, the attributes and the names seals the store: "content_sha256" of the file. It
does not change with the compression or the place of the bytes, so two stores of the same content
have the same. Feature sets may come later: each has its own checksum, and no part in the seal.
"""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from PIL import Image
from scipy.sparse import csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.files import require_plain_name
from preprocessing.hdf5 import Shape, checked_csr, datasets, require_arrays, require_csr
from preprocessing.spot_table import SOURCE_COLUMNS

SCHEMA_VERSION = 1
COUNTS = "counts"
GENE_ID, GENE_NAME = "genes/id", "genes/name"
GENE_SOURCES = {name: f"genes/{name}" for name in SOURCE_COLUMNS}  # only after a gene table
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
LEFT_OUT = "left_out/xy_px0"  # only where spots were left out as off tissue
IMAGE_TRANSFORM, CORRECTION = "image_transform", "registration_correction"  # attributes, if any
JSON_ATTRS = ("source_sha256", "settings", "dropped", "notes", "warnings", IMAGE_TRANSFORM)
COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 2, "shuffle": True}
SEAL, _OWN = "content_sha256", "sha256"  # attributes: of the file, and of every dataset
_JPEG_QUALITY = 90
_LARGEST_PICTURE = 1 << 26  # pixels of a patch or thumbnail; a few bytes can claim 4e9
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_GAP = 16_384  # stored values between two runs of rows that are read along rather than skipped
_PIECE = 8_000_000  # stored values that are in memory at once for scattered rows
_HASHED_BYTES = 1 << 24  # of a dataset that are in memory at once for its checksum
Rows = slice | np.ndarray


def _encoded(item: Any, kind: str, version: str = "0.2.0") -> Any:
    """The same dataset or group, marked as AnnData marks it."""
    item.attrs.update({"encoding-type": kind, "encoding-version": version})
    return item


def write_strings(file: h5py.Group, path: str, values: np.ndarray) -> h5py.Dataset:
    """Write (n,) strings as an AnnData string array."""
    texts = [str(v) for v in values]
    data = file.create_dataset(path, data=texts, dtype=h5py.string_dtype())
    return _encoded(data, "string-array")


def read_strings(file: h5py.Group, path: str) -> np.ndarray:
    """Read strings, (n,) object array of str."""
    return np.array(file[path].asstr()[:], dtype=object)


def write_array(file: h5py.Group, path: str, values: np.ndarray) -> h5py.Dataset:
    """Write numbers as an AnnData array."""
    return _encoded(file.create_dataset(path, data=values), "array")


def write_features(file: h5py.File, name: str, values: np.ndarray) -> h5py.Dataset:
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
    return write_array(file, f"{FEATURES}/{name}", values.astype(dtype))


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
    """Decode JPEG bytes, uint8 (n,) -> uint8 (h, w, 3); OSError where they are damaged."""
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=("JPEG",)) as picture:
            if picture.width * picture.height > _LARGEST_PICTURE:
                raise OSError(f"claims {picture.width} x {picture.height} pixels")
            return np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error


def _decode_raw(data: np.ndarray) -> np.ndarray:
    side = round((data.size / 3) ** 0.5)
    return data.reshape(side, side, 3)


def _encode_raw(patch: np.ndarray) -> bytes:
    return np.ascontiguousarray(patch).tobytes()


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"jpeg": encode_jpeg, "raw": _encode_raw}
DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"jpeg": decode_jpeg, "raw": _decode_raw}


def read_attrs(file: h5py.File) -> dict[str, Any]:
    """Read the attributes of a store as plain Python values."""
    values = {key: _plain(value) for key, value in file.attrs.items()}
    return {k: json.loads(v) if k in JSON_ATTRS else v for k, v in values.items()}


def write_counts(file: h5py.File, counts: csr_matrix) -> None:
    """Write counts (S, G) as an AnnData csr_matrix group: int32, intensities float32."""
    group = _encoded(file.create_group(COUNTS), "csr_matrix", "0.1.0")
    group.attrs["shape"] = np.array(counts.shape, dtype=np.int64)
    parts = (
        ("data", counts.data, np.float32 if counts.dtype.kind == "f" else np.int32),
        ("indices", counts.indices, np.int32),
        ("indptr", counts.indptr, np.int64),
    )
    for name, values, dtype in parts:
        narrow = values.astype(dtype, copy=False)
        group.create_dataset(name, data=narrow, chunks=True, **COMPRESSION)


def counts_shape(file: h5py.File) -> tuple[int, int]:
    """Return (S, G) as the store states them."""
    spots, genes = (int(n) for n in file[COUNTS].attrs["shape"])
    return spots, genes


def read_counts(file: h5py.File) -> csr_matrix:
    """Read counts, (S, G) CSR, int32 or float32; ValueError where they make no CSR matrix."""
    group = file[COUNTS]
    shape = counts_shape(file)
    return checked_csr(group["data"][:], group["indices"][:], group["indptr"][:], shape)


def read_count_rows(file: h5py.File, rows: Rows, indptr: np.ndarray | None = None) -> csr_matrix:
    """Read some rows of the counts.

    Args:
        file: the store.
        rows: a slice, or (n,) row numbers in any order, repeats allowed, or an (S,) mask.
        indptr: (S + 1,) row starts, if they are at hand (a slice does without them).

    Returns:
        (n, G) CSR in the order of ``rows``.

    Raises:
        DataError: a row number outside 0..S-1, or a mask of another length.
        ValueError: what was read does not make a CSR matrix.
    """
    spots = counts_shape(file)[0]
    if isinstance(rows, slice):
        start, stop, step = rows.indices(spots)
        if step == 1:
            return _run(file, start, max(start, stop), indptr)
        rows = np.arange(start, stop, step)
    index = _row_numbers(rows, spots)
    if len(index) == 0:
        return _run(file, 0, 0, indptr)
    if indptr is None:
        indptr = file[COUNTS]["indptr"][:]
    wanted = np.unique(index)
    skipped = indptr[wanted[1:]] - indptr[wanted[:-1] + 1]
    piece = indptr[wanted] // _PIECE
    runs = np.split(wanted, np.flatnonzero((skipped > _GAP) | (np.diff(piece) > 0)) + 1)
    blocks = [_run(file, int(r[0]), int(r[-1]) + 1, indptr)[r - r[0]] for r in runs]
    found = blocks[0] if len(blocks) == 1 else vstack(blocks, format="csr")
    if len(wanted) == len(index) and (wanted == index).all():
        return found
    return found[np.searchsorted(wanted, index)]


def _row_numbers(rows: np.ndarray, spots: int) -> np.ndarray:
    array = np.asarray(rows)
    if array.dtype == bool:
        if array.shape != (spots,):
            raise DataError(f"mask of shape {array.shape} for {spots} spots; expected one a spot")
        return np.flatnonzero(array)
    index = array.astype(np.int64).ravel()
    if index.size and (index.min() < 0 or index.max() >= spots):
        raise DataError(
            f"row {int(index.min())}..{int(index.max())} asked, there are 0..{spots - 1}"
        )
    return index


def _run(file: h5py.File, start: int, stop: int, indptr: np.ndarray | None) -> csr_matrix:
    """Read the rows start..stop-1 in one piece."""
    group = file[COUNTS]
    source = group["indptr"] if indptr is None else indptr
    place = np.asarray(source[start : stop + 1], dtype=np.int64)
    low, high = int(place[0]), int(place[-1])
    parts = (group["data"][low:high], group["indices"][low:high], place - low)
    return checked_csr(*parts, (stop - start, counts_shape(file)[1]))


def require_schema(file: h5py.File) -> None:
    """Compare every part of a store with the schema; no values are read.

    Raises:
        DataError: a part or attribute is missing, of another type or shape; names it.
    """
    sides: list[tuple[int, ...]] = [
        getattr(file[name], "shape", None) or () for name in (BARCODE, GENE_ID)
    ]
    if any(len(side) != 1 for side in sides):
        raise DataError(f"{BARCODE} and {GENE_ID} have shapes {sides}, expected (n,) each")
    spots, genes = (int(side[0]) for side in sides)
    expected: dict[str, tuple[str, Shape]] = {BARCODE: ("text", (spots,))}
    named = (GENE_ID, GENE_NAME, *(path for path in GENE_SOURCES.values() if path in file))
    expected |= dict.fromkeys(named, ("text", (genes,)))
    expected |= dict.fromkeys((XY_UM, XY_PX0), ("number", (spots, 2)))
    expected[TISSUE_FRACTION] = ("number", (spots,))
    for name in (PATCHES, CONTEXT):
        if name in file:
            expected[f"{name}/{BYTES}"] = ("whole number", (None,))
            expected |= dict.fromkeys(
                (f"{name}/{START}", f"{name}/{SIZE}"), ("whole number", (spots,))
            )
    sets = [f"{FEATURES}/{name}" for name in file.get(FEATURES, ())]
    expected |= dict.fromkeys(sets, ("number", (spots, None)))
    if THUMBNAIL in file:
        expected[THUMBNAIL] = ("whole number", (None,))
    require_arrays(file, expected)
    if (found := counts_shape(file)) != (spots, genes):
        raise DataError(f"{COUNTS} has shape {found}, expected {(spots, genes)}")
    require_csr(file, COUNTS, (spots, genes))
    _require_labels(file, spots)
    numbers = ["mpp", *(["patch_um", "patch_px"] if PATCHES in file else [])]
    numbers += ["context_um"] if CONTEXT in file else []
    owned = [(file, name) for name in numbers]
    owned += [(file[THUMBNAIL], "downsample")] if THUMBNAIL in file else []
    for item, name in owned:
        value = _number(item, name)
        if not 0.0 < value < np.inf:
            raise DataError(f"the attribute {name} is {value}, expected a number above 0")


def _number(item: h5py.File | h5py.Dataset, name: str) -> float:
    value = np.asarray(item.attrs.get(name))
    if value.shape or value.dtype.kind not in "iuf":
        raise DataError(f"the attribute {name} is no number")
    return float(value)


def _require_labels(file: h5py.File, spots: int) -> None:
    for name, column in file[LABELS].items():
        text = isinstance(column, h5py.Dataset) and h5py.check_string_dtype(column.dtype)
        require_arrays(file[LABELS], {name: ("text" if text else "number", (spots,))})
        if not isinstance(column.attrs.get("name"), str):
            raise DataError(f"{LABELS}/{name} lacks the attribute name, a text")
        if not np.isfinite(_number(column, "position")):
            raise DataError(f"{LABELS}/{name}: the attribute position is not finite")


def seal(file: h5py.File) -> None:
    """Write the checksums of a store that is complete."""
    for _, data in datasets(file):
        if _OWN not in data.attrs:
            seal_dataset(data)
    file.attrs[SEAL] = _over_all(file)


def part_digests(file: h5py.File) -> dict[str, str]:
    """Content of a store part by part, by the checksums of its datasets.

    Returns:
        "counts", "genes", "coordinates", and where they are "patches", "context" and
        "features/NAME" -> SHA-256. Two slides with the same counts are one section, whatever they
        are called. Datasets without a checksum (of an older version) are read.
    """
    parts = {"counts": [f"{COUNTS}/{n}" for n in ("data", "indices", "indptr")]}
    parts |= {"genes": [GENE_NAME], "coordinates": [XY_UM, XY_PX0]}
    parts |= {g: [f"{g}/{BYTES}", f"{g}/{START}"] for g in (PATCHES, CONTEXT) if g in file}
    parts |= {f"{FEATURES}/{n}": [f"{FEATURES}/{n}"] for n in file.get(FEATURES, ())}
    found = {
        part: [file[name].attrs.get(_OWN) or _digest(file[name]) for name in names]
        for part, names in parts.items()
    }
    return {part: hashlib.sha256(" ".join(own).encode()).hexdigest() for part, own in found.items()}


def seal_dataset(data: h5py.Dataset, digest: str | None = None) -> None:
    """Write the checksum of one dataset; ``digest`` if it was made while its bytes were written."""
    data.attrs[_OWN] = _digest(data) if digest is None else digest


def bytes_digest() -> Any:
    """A running SHA-256 for a dataset of bytes, one dimension, to be fed in their order."""
    return hashlib.sha256(b"|u1")


def broken(file: h5py.File) -> list[str] | None:
    """Compare a store with its checksums; every dataset is read once, in pieces.

    Returns:
        What differs: names of datasets, or "attributes"; None when the store was not sealed (it
        was written by an older version).
    """
    if SEAL not in file.attrs:
        return None
    found = [name for name, data in datasets(file) if not _intact(data)]
    if file.attrs[SEAL] != _over_all(file):
        found.append("attributes or the list of contents")
    return found


def unsealed_features(file: h5py.File) -> list[str]:
    """Names of the feature sets without a checksum: an older version, or another program."""
    return [
        name
        for name, data in datasets(file)
        if name.startswith(f"{FEATURES}/") and _OWN not in data.attrs
    ]


def _intact(data: h5py.Dataset) -> bool:
    """Whether the values are those that were written; features may have no checksum."""
    known = data.attrs.get(_OWN)
    if known is None:
        return bool(data.name.startswith(f"/{FEATURES}/"))
    try:
        return bool(known == _digest(data))
    except (OSError, RuntimeError, ValueError):  # a piece that cannot even be decompressed
        return False


def _digest(data: h5py.Dataset) -> str:
    if data.ndim == 1 and data.dtype == np.uint8:
        running = bytes_digest()
    else:
        kind = "text" if h5py.check_string_dtype(data.dtype) else data.dtype.str
        running = hashlib.sha256(f"{kind} {data.shape}".encode())
    rows = max(1, _HASHED_BYTES // max(1, data.dtype.itemsize * int(np.prod(data.shape[1:]))))
    for start in range(0, len(data), rows) if data.ndim else ():
        running.update(_bytes(data, data[start : start + rows]))
    if not data.ndim:
        running.update(np.asarray(data[()]).tobytes())
    return str(running.hexdigest())


def _bytes(data: h5py.Dataset, values: Any) -> bytes:
    if not h5py.check_string_dtype(data.dtype):
        return np.ascontiguousarray(values).tobytes()
    texts = [v if isinstance(v, bytes) else str(v).encode() for v in values]
    return b"".join(str(len(text)).encode() + b":" + text for text in texts)


def _over_all(file: h5py.File) -> str:
    sealed = {
        name: [data.attrs.get(_OWN), {k: _plain(data.attrs.get(k)) for k in ("name", "position")}]
        for name, data in datasets(file)
        if not name.startswith(f"{FEATURES}/")
    }
    attributes = {key: _plain(value) for key, value in file.attrs.items() if key != SEAL}
    shape = _plain(file[COUNTS].attrs["shape"])
    text = json.dumps([attributes, shape, sealed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """An attribute as JSON has it; NaN is a word there."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
