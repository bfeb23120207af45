"""Zarr folders from anywhere: nothing is unpickled, fills the memory or leads out of the folder."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import DataError
from preprocessing.hdf5 import DEFLATE_MOST, HARMLESS_BYTES

_METADATA = (".zarray", ".zmetadata", "zarr.json")


def check_arrays(folder: Path) -> None:
    """Check that no array below a zarr folder would be unpickled or fill the memory.

    Raises:
        DataError: one would, its metadata are no JSON, or a link leads out of the folder.
    """
    root, stored = folder.resolve(), functools.cache(_stored_bytes)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            link = Path(place) / name
            if link.is_symlink() and not link.resolve().is_relative_to(root):
                raise DataError(f"{link} is a link to another place; copy what it leads to")
        for name in set(names) & set(_METADATA):
            path = Path(place) / name
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"{path} is damaged ({error}); copy the folder again") from error
            if any("pickle" in codec for codec in _codecs(content)):
                raise DataError(
                    f"{path} holds pickled objects, which are not read; write numbers and texts "
                    "(current versions of anndata do)"
                )
            for place_of, one in _arrays(path, content):
                _require_sound_size(path, one, stored, place_of)


def _arrays(path: Path, content: Any) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Folder and metadata of every array that a file of metadata describes, itself or others."""
    known: list[tuple[str, Any]] = [("", content)]
    for key in ("metadata", "consolidated_metadata"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        inner = inner.get("metadata") if key != "metadata" and isinstance(inner, Mapping) else inner
        known += inner.items() if isinstance(inner, Mapping) else ()
    for name, one in known:
        if isinstance(one, Mapping) and "shape" in one:
            yield path.parent / str(name).removesuffix(".zarray"), one


def _stored_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    files = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
    return sum(file.stat().st_size for file in files)


def _require_sound_size(
    path: Path, array: Mapping[str, Any], stored_bytes: Callable[[Path], int], folder: Path
) -> None:
    """Refuse an array whose chunks, the files of its folder, cannot hold what it claims."""
    try:
        width = np.dtype(array.get("dtype") or array.get("data_type")).itemsize or 8
    except TypeError:  # texts, and what only zarr knows
        width = 8
    try:
        grid = array.get("chunk_grid") or {"configuration": {}}
        chunk = array.get("chunks") or grid["configuration"].get("chunk_shape") or ()
        claimed = width * max(math.prod(map(int, array["shape"])), math.prod(map(int, chunk)))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"{path} has no shape of numbers ({error}); copy it again") from error
    stored = stored_bytes(folder)
    if claimed > DEFLATE_MOST * stored + HARMLESS_BYTES:
        raise DataError(
            f"{path}: an array claims {claimed / 2**30:,.1f} GiB in {stored:,} bytes, more than "
            "these can hold; copy the folder again"
        )


def _codecs(content: object) -> Iterator[str]:
    """Names of everything that looks like a codec."""
    if isinstance(content, Mapping):
        for key in ("id", "name"):
            if isinstance(content.get(key), str):
                yield content[key].lower()
        for value in content.values():
            yield from _codecs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _codecs(value)
