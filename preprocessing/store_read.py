"""Reading a slide store: `SlideStore`. Shapes: S spots, G genes."""

import hashlib
import shutil
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing import store_layout as layout
from preprocessing.atomic import atomic_path
from preprocessing.errors import DataError

_AGAIN = "delete the file and run `hibio prepare` again"


class SlideStore:
    """A prepared slide, opened for reading; use it in a ``with`` statement.

    Nothing is kept in memory: every method reads from the file.

    Attributes:
        path: the file.
        attrs: ids, scale, settings and source hashes.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            DataError: missing, truncated, not a store, or of another schema version.
        """
        self.path = Path(path)
        self._file = self._open()
        try:
            self.attrs: dict[str, Any] = layout.read_attrs(self._file)
            self._check()
        except DataError:
            self.close()
            raise
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            self.close()
            raise DataError(f"{self.path}: damaged attributes ({error}); {_AGAIN}") from error
        self._sha256: str | None = None
        self._patch_place: tuple[np.ndarray, np.ndarray] | None = None

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist; give a store written by `hibio prepare`")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(
                f"{self.path} is not a complete HDF5 file ({error}); {_AGAIN}"
            ) from error

    def _check(self) -> None:
        found = self.attrs.get("schema_version")
        if found is None:
            raise DataError(
                f"{self.path} is an HDF5 file, but not a slide store (no "
                "schema_version); give a file written by `hibio prepare`"
            )
        if found != layout.SCHEMA_VERSION:
            raise DataError(
                f"{self.path} has schema version {found}, this program reads version "
                f"{layout.SCHEMA_VERSION}; {_AGAIN}"
            )
        missing = [name for name in layout.REQUIRED if name not in self._file]
        if missing:
            raise DataError(f"{self.path} lacks {', '.join(missing)}; {_AGAIN}")

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; the store cannot be read any more."""
        self._file.close()

    @property
    def slide_id(self) -> str:
        """Name of the slide."""
        return str(self.attrs["slide_id"])

    @property
    def patient_id(self) -> str:
        """Patient; splits are made by it."""
        return str(self.attrs["patient_id"])

    @property
    def mpp(self) -> float:
        """Micrometres per level-0 pixel of the image."""
        return float(self.attrs["mpp"])

    @property
    def has_image(self) -> bool:
        """Whether there are patches."""
        return layout.PATCHES in self._file

    @property
    def has_counts(self) -> bool:
        """Whether genes were counted; False for a slide that is only an image."""
        return bool(self._file[layout.GENE_ID].shape[0])

    @property
    def n_spots(self) -> int:
        """Number of spots S."""
        return int(self._file[layout.BARCODE].shape[0])

    @property
    def gene_ids(self) -> np.ndarray:
        """Gene ids, (G,) str."""
        return layout.read_strings(self._file, layout.GENE_ID)

    @property
    def gene_names(self) -> np.ndarray:
        """Gene symbols, (G,) str, unique."""
        return layout.read_strings(self._file, layout.GENE_NAME)

    @property
    def barcodes(self) -> np.ndarray:
        """Barcodes, (S,) str, along a Hilbert curve of the coordinates."""
        return layout.read_strings(self._file, layout.BARCODE)

    @property
    def xy_um(self) -> np.ndarray:
        """Spot centres in micrometres, (S, 2) float64."""
        return np.asarray(self._file[layout.XY_UM][:])

    @property
    def xy_px0(self) -> np.ndarray:
        """Spot centres in level-0 pixels of the image, (S, 2) float64."""
        return np.asarray(self._file[layout.XY_PX0][:])

    @property
    def tissue_fraction(self) -> np.ndarray:
        """Part of each patch that is tissue, (S,) float32; NaN without image."""
        return np.asarray(self._file[layout.TISSUE_FRACTION][:])

    def counts(self) -> csr_matrix:
        """Return the raw counts, (S, G) int32 CSR."""
        try:
            return layout.read_counts(self._file)
        except (ValueError, KeyError, OSError) as error:
            raise DataError(f"{self.path}: damaged counts ({error}); {_AGAIN}") from error

    def labels(self) -> pd.DataFrame:
        """Return the labels, (S, columns); categories str (missing ""), measurements float."""
        return pd.DataFrame(self.label_columns(), index=pd.RangeIndex(self.n_spots))

    def label_columns(self) -> dict[str, np.ndarray]:
        """Return the labels as stored, column -> (S,) float64 or object."""
        return layout.read_labels(self._file)

    @property
    def n_patches(self) -> int:
        """Number of patches: S, or 0 without image."""
        return int(self._file[layout.PATCH_START].shape[0]) if self.has_image else 0

    def patches(self, indices: np.ndarray | list[int] | None = None) -> np.ndarray:
        """Read image patches.

        Args:
            indices: (n,) spot numbers in any order, repeats allowed; None: all spots.

        Returns:
            uint8 (n, px, px, 3).

        Raises:
            DataError: no image, a number outside 0..S-1, or damaged bytes.
        """
        if not self.has_image:
            raise DataError(
                f"{self.path} has no patches (counts only); give an image in the "
                "manifest and prepare the slide again"
            )
        index = np.arange(self.n_spots) if indices is None else np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.n_spots):
            raise DataError(
                f"{self.path}: patch {int(index.min())}..{int(index.max())} asked, "
                f"there are 0..{self.n_spots - 1}"
            )
        px = int(self.attrs["patch_px"])
        result = np.empty((len(index), px, px, 3), dtype=np.uint8)
        decode = layout.DECODERS[str(self.attrs["patch_encoding"])]
        for place, data in self._patch_bytes(index):
            try:
                result[place] = decode(data)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.path}: patch {int(index[place])} is damaged ({error}); {_AGAIN}"
                ) from error
        return result

    def _patch_bytes(self, index: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Read the encoded patches; those that lie side by side in one piece."""
        if self._patch_place is None:
            self._patch_place = (
                self._file[layout.PATCH_START][:],
                self._file[layout.PATCH_SIZE][:],
            )
        start, size = (values[index] for values in self._patch_place)
        order = np.argsort(start, kind="stable")
        begin, end = start[order], (start + size)[order]
        cuts = np.flatnonzero(begin[1:] > np.maximum.accumulate(end)[:-1]) + 1
        data, result = self._file[layout.PATCH_BYTES], []
        for run in np.split(np.arange(len(order)), cuts):
            if len(run) == 0:
                continue
            low = int(begin[run[0]])
            piece = data[low : int(end[run].max())]
            result += [(int(order[i]), piece[begin[i] - low : end[i] - low]) for i in run]
        return result

    @property
    def feature_names(self) -> list[str]:
        """Names of the feature sets, such as "handcrafted"."""
        return sorted(self._file[layout.FEATURES]) if layout.FEATURES in self._file else []

    def features(self, name: str) -> np.ndarray:
        """Return one feature set, (S, F) float32.

        Raises:
            DataError: there is none of this name; names the nearest.
        """
        names = self.feature_names
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or '-'}"
            raise DataError(f"{self.path} has no features {name!r} ({hint})")
        return np.asarray(self._file[f"{layout.FEATURES}/{name}"][:], dtype=np.float32)

    def write_features(self, name: str, values: np.ndarray) -> None:
        """Add or replace one feature set; the file is rewritten beside and then exchanged.

        Args:
            name: plain name, such as the encoder's.
            values: (S, F), finite.

        Raises:
            DataError: wrong number of rows, or values that are not finite.
        """
        if len(values) != self.n_spots:
            raise DataError(f"{self.path}: {len(values)} rows of features for {self.n_spots} spots")
        with atomic_path(self.path) as temporary:
            shutil.copyfile(self.path, temporary)
            with h5py.File(temporary, "r+") as file:
                if f"{layout.FEATURES}/{name}" in file:
                    del file[f"{layout.FEATURES}/{name}"]
                layout.write_features(file, name, np.asarray(values))
            self._file.close()
        self._file = self._open()
        self._sha256 = None

    @property
    def thumbnail(self) -> np.ndarray | None:
        """The whole slide, uint8 (h, w, 3) of at most 1024 px; None without image."""
        if layout.THUMBNAIL not in self._file:
            return None
        return layout.decode_jpeg(self._file[layout.THUMBNAIL][:])

    @property
    def thumbnail_downsample(self) -> float | None:
        """Level-0 pixels per thumbnail pixel; None without image."""
        if layout.THUMBNAIL not in self._file:
            return None
        return float(self._file[layout.THUMBNAIL].attrs["downsample"])

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        if self._sha256 is None:
            self._sha256 = file_sha256(self.path)
        return self._sha256


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
