"""HDF5 files that claim more values than their bytes can hold, told before anything is read.

A few kilobytes can declare a dataset of terabytes, which reading it would fill the memory with.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py

from preprocessing.errors import DataError

DEFLATE_MOST = 1100  # bytes that deflate makes of one, at most 1032
HARMLESS_BYTES = 1 << 28  # a dataset that was never written holds none; so much of it is read


def datasets(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield name and dataset, by name."""
    names: list[str] = []
    group.visit(names.append)
    for name in sorted(names):
        item = group[name]
        if isinstance(item, h5py.Dataset):
            yield name, item


def oversized(group: h5py.Group, harmless_bytes: int) -> list[str]:
    """Names of the datasets that claim more values than their bytes in the file can hold.

    Args:
        group: a file, or a part of it; nothing is read.
        harmless_bytes: what a dataset may claim beyond that.
    """
    return [
        name
        for name, data in datasets(group)
        if data.shape is not None
        and data.size * data.dtype.itemsize
        > DEFLATE_MOST * data.id.get_storage_size() + harmless_bytes
    ]


def require_sound_sizes(path: Path, group: h5py.Group) -> None:
    """Refuse a file with a dataset that its bytes cannot hold.

    Raises:
        DataError: names the datasets and what they claim.
    """
    absurd = oversized(group, HARMLESS_BYTES)
    if absurd:
        first = group[absurd[0]]
        claimed = first.size * first.dtype.itemsize / 2**30
        more = f" (and {len(absurd) - 1} more)" if len(absurd) > 1 else ""
        raise DataError(
            f"{path}: {absurd[0]}{more} claims {claimed:,.1f} GiB in "
            f"{first.id.get_storage_size():,} bytes of the file, more than these can hold; "
            "download or write it again"
        )
