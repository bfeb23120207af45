"""Patches of HEST-1k (`patches/<id>.h5`) as a slide, for samples without their whole-slide image.

What lies on no patch is white. Shapes: N patches of p x p pixels.
"""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from preprocessing.errors import DataError
from preprocessing.hdf5 import open_guarded
from preprocessing.scale import SAME
from preprocessing.slides.pixels import Pixels, Slide, damage_named, image_scale, paste, unpainted

HDF5 = b"\x89HDF\r\n\x1a\n"
PATCH_UM = 112.0  # across the patches that HEST-1k cuts
_COARSE = 8  # the third level, for thumbnails: all patches are reduced once


class HestPatches(Slide):
    """Patches put back to their places; a window that is a stored patch is that patch.

    Levels are the scan, the patches' own scale (coarser than the scan, or finer where HEST-1k
    enlarged it), and an eighth of the coarser of the two.
    """

    by_window = True

    def __init__(self, path: Path, black_is_background: bool = False) -> None:
        """Open the file.

        Raises:
            DataError: damaged, or no patches with coordinates and their size in the scan.
        """
        self.path, self.black_is_background = path, black_is_background
        with damage_named(path):
            self._file = open_guarded(path, ours=False)
        try:
            with damage_named(path):
                self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._small: Pixels | None = None

    def _read_header(self) -> None:
        images, coords = self._file.get("img"), self._file.get("coords")
        usable = isinstance(images, h5py.Dataset) and isinstance(coords, h5py.Dataset)
        if usable:
            count, *shape = images.shape
            usable = count > 0 and len(shape) == 3 and shape[0] == shape[1] and shape[2] == 3
            usable &= images.dtype == np.uint8 and coords.shape == (count, 2)
        known = dict(images.attrs) if usable else {}
        factor, side = known.get("downsample"), known.get("patch_size_src")
        exact = factor and float(factor) * images.shape[1]  # patch_size_src may be rounded to it
        if exact and (side is None or abs(exact - float(side)) <= 0.5):
            side = exact
        if not usable or side is None or not 1 <= float(side) < 1e6:
            raise DataError(
                f"{self.path}: no patches as HEST-1k writes them; expected img (N, p, p, 3) uint8 "
                "with the attribute patch_size_src (their edge in the scan, pixels) and coords "
                "(N, 2); for other HDF5 files leave the column image empty"
            )
        self._images, self._side = images, float(side)
        self._px = int(images.shape[1])
        self._corners = np.asarray(coords[:], dtype=np.float64)  # (N, 2) x, y in level 0
        if not np.isfinite(self._corners).all():
            raise DataError(f"{self.path}: coords are not all finite; write the file again")
        down = self._side / self._px
        own = [down] if abs(down - 1.0) > 0.01 else []
        self.level_downsamples = (1.0, *own, _COARSE * max(down, 1.0))
        width, height = (max(1, int(v)) for v in np.ceil(self._corners.max(axis=0) + self._side))
        self.level_dimensions = tuple(
            (max(1, round(width / d)), max(1, round(height / d))) for d in self.level_downsamples
        )
        mpp = known.get("pixel_size")
        if isinstance(mpp, int | float | np.number) and self._is_of_patches(float(mpp)):
            mpp = float(mpp) / down
        self.mpp, self.scale = image_scale(self.path, {"pixel_size": [mpp, mpp]})

    def _is_of_patches(self, mpp: float) -> bool:
        """Whether it is a patch's um per pixel, not the scan's: HEST-1k cuts 112 um."""
        scan, patch = (abs(px * mpp / PATCH_UM - 1) for px in (self._side, self._px))
        return patch <= SAME < scan

    def read_region(self, xy_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """See `Slide.read_region`."""
        down = self.level_downsamples[level]
        target = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        edge = self._side / down
        place = (self._corners - np.asarray(xy_px0, dtype=np.float64)) / down  # (N, 2)
        found = np.flatnonzero(((place > -edge) & (place < size)).all(axis=1))
        off_centre = np.abs(place[found] + edge / 2 - np.asarray(size) / 2).max(axis=1)
        with damage_named(self.path):
            own_size = size == (self._px, self._px) and abs(edge - self._px) <= 0.5
            near = max(1.0, 1.0 / down)  # a pixel of the scan: corners and centres are rounded
            if own_size and len(found) and off_centre.min() <= near:
                return self._shown(self._images[found[off_centre.argmin()]])
            for index in found[np.argsort(-off_centre, kind="stable")]:
                x, y = (round(float(v)) for v in place[index])
                paste(target, self._patch(int(index), edge), x, y)
        return self._shown(target)

    def _shown(self, region: Pixels) -> Pixels:
        return unpainted(region) if self.black_is_background else region

    def _patch(self, index: int, edge: float) -> Pixels:
        side = max(1, round(edge))
        if side * 4 <= self._px:
            return _resized(self._reduced()[index], side)
        return _resized(self._images[index], side)

    def _reduced(self) -> Pixels:
        """All patches at an eighth of their size, (N, p / 8, p / 8, 3)."""
        if self._small is None:
            side = max(1, self._px // _COARSE)
            self._small = np.stack(
                [_resized(self._images[i], side) for i in range(len(self._images))]
            )
        return self._small

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def hest_coordinates(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read which spot each patch belongs to, and its centre.

    Returns:
        barcodes (N,) str, and centres (N, 2) x and y in pixels of the scan.

    Raises:
        DataError: no patches of HEST-1k, or they have no barcodes.
    """
    with HestPatches(path) as slide, damage_named(path):
        names = slide._file.get("barcode")
        if names is None:
            raise DataError(f"{path}: no dataset barcode; expected one name a patch")
        values = np.ravel(names[()]).tolist()
        texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]
        return np.array(texts, dtype=object), slide._corners + slide._side / 2


def _resized(patch: Pixels, side: int) -> Pixels:
    if patch.shape[0] == side:
        return patch
    return np.asarray(Image.fromarray(patch).resize((side, side), Image.Resampling.BOX))
