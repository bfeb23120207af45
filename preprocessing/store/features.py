"""Adding a feature set to a store that exists. Shapes: S spots, F features.

The store is copied beside itself, the copy gets the features, is forced to disk and takes the
store's name. A process killed at any moment leaves the old store or the new one, nothing between.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from preprocessing.atomic import atomic_path
from preprocessing.errors import DataError
from preprocessing.store import layout
from preprocessing.store.checksum import seal_dataset
from preprocessing.store.hdf5_write import hdf5_writer
from preprocessing.store.read import SlideStore

#: Not the name of a feature set: a configuration means the patches themselves by it.
RESERVED = ("patches",)
_ATTRIBUTE = "origin"
_ATTEMPTS = 5


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
            layout.write_features(file, name, np.asarray(values))
            data = file[f"{layout.FEATURES}/{name}"]
            data.attrs[_ATTRIBUTE] = origin
            seal_dataset(data)
        if _state(path) != before:
            raise _StoreChangedError


def _state(path: Path) -> tuple[int, int, int]:
    """What differs between two files that had the same name one after the other."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def feature_origin(path: str | Path, name: str) -> dict[str, Any] | None:
    """Where a feature set comes from, as given to :func:`add_features`.

    Returns:
        None when the store has no such features; empty when their origin was not kept.

    Raises:
        DataError: not a store.
    """
    with SlideStore(path) as store:
        if name not in store.feature_names:
            return None
    with h5py.File(path, "r") as file:
        text = file[f"{layout.FEATURES}/{name}"].attrs.get(_ATTRIBUTE, "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}
