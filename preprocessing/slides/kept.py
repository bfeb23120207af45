"""The picture that an AnnData file keeps in uns['spatial'], a small copy of its section.

scanpy and squidpy keep Space Ranger's hires and lowres pictures there, HEST-1k one of its own.
"""

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from preprocessing.errors import DataError
from preprocessing.hdf5 import open_guarded
from preprocessing.slides.channels import Channels, deep_note, full_light
from preprocessing.slides.pixels import Pixels, PlainSlide, check_size, damage_named


class KeptPicture(NamedTuple):
    """Where a picture lies in its file.

    Attributes:
        name: such as "hires".
        node: path in the file.
        scale: pixels of it per unit of the coordinates.
        size: (width, height).
    """

    name: str
    node: str
    scale: float
    size: tuple[int, int]


def kept_picture(path: Path) -> KeptPicture | None:
    """The largest picture of the one library in uns['spatial'] that says its scale, or None.

    Raises:
        DataError: an HDF5 file that cannot be read.
    """
    if not h5py.is_hdf5(path):
        return None
    with damage_named(path), open_guarded(path, ours=False) as file:
        libraries = file.get("uns/spatial")
        if not isinstance(libraries, h5py.Group) or len(libraries) != 1:
            return None
        library = libraries[next(iter(libraries))]
        images = library.get("images") if isinstance(library, h5py.Group) else None
        if not isinstance(images, h5py.Group):
            return None
        found = [
            KeptPicture(name, node.name, scale, node.shape[1::-1])
            for name, node in images.items()
            if _is_picture(node)
            for scale in [_scale(library.get(f"scalefactors/tissue_{name}_scalef"))]
            if scale > 0
        ]
        return max(found, key=lambda one: one.size[0] * one.size[1], default=None)


def _is_picture(node: object) -> bool:
    if not isinstance(node, h5py.Dataset) or node.dtype.kind not in "uf":
        return False
    return node.ndim == 2 or (node.ndim == 3 and node.shape[2] in (1, 3, 4))


def _scale(node: object) -> float:
    """A positive number; 0 for anything else."""
    if not isinstance(node, h5py.Dataset) or node.size != 1 or node.dtype.kind not in "iuf":
        return 0.0
    value = float(np.ravel(node[()])[0])
    return value if np.isfinite(value) and value > 0 else 0.0


class KeptSlide(PlainSlide):
    """The picture of `kept_picture`, decoded as a whole; its scale is that of the spots."""

    def _open(self) -> tuple[int, int]:
        kept = kept_picture(self.path)
        if kept is None:
            raise DataError(
                f"{self.path} keeps no picture with its scale factor in uns['spatial'] (of one "
                "library); name the slide itself in the column image"
            )
        check_size(self.path, kept.size)
        with open_guarded(self.path, ours=False) as file:
            values = file[kept.node][()]
        told = f"the picture {kept.name!r} of uns['spatial'], {kept.scale:.4g} of full resolution"
        self.notes = (told,)
        self._picture = self._rgb(values[..., None] if values.ndim == 2 else values)
        return kept.size

    def _rgb(self, values: np.ndarray) -> Pixels:
        """Values (h, w, 1, 3 or 4), whole or parts of 1 as matplotlib reads them, as RGB."""
        white = 255
        if values.dtype.kind == "f":
            if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
                raise DataError(f"{self.path}: a picture in uns['spatial'] is not 0..1 or 0..255")
            values = np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8)
        elif values.dtype != np.uint8:
            white = full_light(int(values[..., :3].max()))
            self.notes = (*self.notes, deep_note(white))
            values = values.astype(np.uint16)
        kind, alpha = ("grey", None) if values.shape[2] == 1 else ("rgb", 3)
        opaque = alpha if values.shape[2] == 4 else None
        return Channels(self.path, kind, opaque, white=white).rgb(values)

    def _paint(self, target: Pixels, level: int, x: int, y: int) -> None:
        target[:] = self._picture[y : y + target.shape[0], x : x + target.shape[1]]

    def close(self) -> None:
        """Release the pixels."""
        self._picture = np.empty((0, 0, 3), dtype=np.uint8)
