"""The checksums of a slide store's content: written with it, compared by `hibio check`.

Every dataset carries the SHA-256 of its type, shape and values as the attribute "sha256". One more
over all of these, the attributes and the names seals the store: "content_sha256" of the file. It
does not change with the compression or the place of the bytes, so two stores of the same content
have the same. Feature sets may come later: each has its own checksum, and no part in the seal.
"""

import hashlib
import json
from typing import Any

import h5py
import numpy as np

from preprocessing.hdf5_bounds import datasets
from preprocessing.store import layout

SEAL = "content_sha256"
_OWN = "sha256"
_PIECE_BYTES = 1 << 24


def seal(file: h5py.File) -> str:
    """Write the checksums of a store that is complete.

    Args:
        file: open for writing.

    Returns:
        The checksum of the whole, 64 hexadecimal digits.
    """
    for _, data in datasets(file):
        if _OWN not in data.attrs:
            seal_dataset(data)
    file.attrs[SEAL] = _over_all(file)
    return str(file.attrs[SEAL])


def seal_dataset(data: h5py.Dataset, digest: str | None = None) -> None:
    """Write the checksum of one dataset; ``digest`` if it was made while its bytes were written."""
    data.attrs[_OWN] = _digest(data) if digest is None else digest


def bytes_digest() -> Any:
    """A running SHA-256 for a dataset of bytes, one dimension, to be fed in their order."""
    return hashlib.sha256(b"|u1")


def broken(file: h5py.File) -> list[str] | None:
    """Compare a store with its checksums; every dataset is read once, in pieces.

    Args:
        file: open for reading.

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
        if name.startswith(f"{layout.FEATURES}/") and _OWN not in data.attrs
    ]


def _intact(data: h5py.Dataset) -> bool:
    """Whether the values are those that were written; features may have no checksum."""
    known = data.attrs.get(_OWN)
    if known is None:
        return bool(data.name.startswith(f"/{layout.FEATURES}/"))
    try:
        return bool(known == _digest(data))
    except (OSError, RuntimeError, ValueError):  # a piece that cannot even be decompressed
        return False


def _digest(data: h5py.Dataset) -> str:
    if data.ndim == 1 and data.dtype == np.uint8:
        running = bytes_digest()
    else:
        running = hashlib.sha256(f"{_type(data)} {data.shape}".encode())
    rows = max(1, _PIECE_BYTES // max(1, data.dtype.itemsize * int(np.prod(data.shape[1:]))))
    for start in range(0, len(data), rows) if data.ndim else ():
        running.update(_bytes(data, data[start : start + rows]))
    if not data.ndim:
        running.update(np.asarray(data[()]).tobytes())
    return str(running.hexdigest())


def _type(data: h5py.Dataset) -> str:
    return "text" if h5py.check_string_dtype(data.dtype) else str(data.dtype.str)


def _bytes(data: h5py.Dataset, values: Any) -> bytes:
    if not h5py.check_string_dtype(data.dtype):
        return np.ascontiguousarray(values).tobytes()
    texts = [v if isinstance(v, bytes) else str(v).encode() for v in values]
    return b"".join(str(len(text)).encode() + b":" + text for text in texts)


def _over_all(file: h5py.File) -> str:
    sealed = {
        name: [
            data.attrs.get(_OWN),
            {key: _plain(data.attrs.get(key)) for key in ("name", "position")},
        ]
        for name, data in datasets(file)
        if not name.startswith(f"{layout.FEATURES}/")
    }
    attributes = {key: _plain(value) for key, value in file.attrs.items() if key != SEAL}
    shape = _plain(file[layout.COUNTS].attrs["shape"])
    text = json.dumps([attributes, shape, sealed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """An attribute as JSON has it; NaN is a word there."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
