"""Encoded patches of a slide store: those that lie side by side are read in one piece.

Raw patches are gathered from the file mapped into memory, without HDF5. A store may hold two groups
of them, of the spots and of their context, which are stored and read alike.
"""

from typing import NamedTuple

import h5py
import numpy as np

from preprocessing.store import layout


class PatchPlaces(NamedTuple):
    """Where the patches lie.

    Attributes:
        start: (S,) first byte of each.
        size: (S,) bytes of each.
        mapped: uint8 (S, px, px, 3), raw patches in the order of the file; None where they are
            encoded, or not in one piece.
        group: where they lie in the file: `layout.PATCHES` or `layout.CONTEXT`.
    """

    start: np.ndarray
    size: np.ndarray
    mapped: np.ndarray | None
    group: str


def patch_places(file: h5py.File, group: str = layout.PATCHES) -> PatchPlaces:
    """Read where each patch of a group lies in its bytes."""
    start, size = file[group][layout.START][:], file[group][layout.SIZE][:]
    return PatchPlaces(start, size, _mapped(file, group, start, size), group)


def _mapped(file: h5py.File, group: str, start: np.ndarray, size: np.ndarray) -> np.ndarray | None:
    data, px = file[group][layout.BYTES], int(file.attrs["patch_px"])
    one = px * px * 3
    begin = data.id.get_offset()  # None: in chunks, as JPEG is
    if file.attrs["patch_encoding"] != "raw" or begin is None or file.driver != "sec2":
        return None
    whole = len(start) > 0 and (size == one).all() and (start % one == 0).all()
    if not whole or start.min() < 0 or start.max() + one > len(data):
        return None
    shape = (len(data) // one, px, px, 3)
    return np.asarray(np.memmap(file.filename, np.uint8, "r", offset=begin, shape=shape))


def read_patches(file: h5py.File, places: PatchPlaces, index: np.ndarray) -> np.ndarray:
    """Read and decode patches.

    Args:
        file: the store.
        places: as `patch_places` gives them.
        index: (n,) spot numbers in any order, repeats allowed.

    Returns:
        uint8 (n, px, px, 3).

    Raises:
        ValueError: damaged bytes; names the patch.
    """
    if places.mapped is not None:
        gathered: np.ndarray = places.mapped[places.start[index] // places.size[0]]
        return gathered
    px = int(file.attrs["patch_px"])
    result = np.empty((len(index), px, px, 3), dtype=np.uint8)
    decode = layout.DECODERS[str(file.attrs["patch_encoding"])]
    for place, data in patch_bytes(file, places, index):
        try:
            result[place] = decode(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"patch {int(index[place])} is damaged ({error})") from error
    return result


def patch_bytes(
    file: h5py.File, places: PatchPlaces, index: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    """Read the encoded patches of the spots ``index`` (n,).

    Returns:
        (position in ``index``, uint8 bytes) of each, in any order.
    """
    start, size = places.start[index], places.size[index]
    order = np.argsort(start, kind="stable")
    begin, end = start[order], (start + size)[order]
    cuts = np.flatnonzero(begin[1:] > np.maximum.accumulate(end)[:-1]) + 1
    data, result = file[places.group][layout.BYTES], []
    for run in np.split(np.arange(len(order)), cuts):
        if len(run) == 0:
            continue
        low = int(begin[run[0]])
        piece = data[low : int(end[run].max())]
        result += [(int(order[i]), piece[begin[i] - low : end[i] - low]) for i in run]
    return result
