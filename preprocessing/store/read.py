"""Reading a slide store: `SlideStore`. Shapes: S spots, G genes.

Raw patches are gathered from the file mapped into memory, without HDF5. A store may hold two groups
of them, of the spots and of their context, which are stored and read alike.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import file_sha256, files_in, require_plain_name
from preprocessing.findings import SlideWarning
from preprocessing.hdf5 import open_guarded
from preprocessing.spot_table import RNA
from preprocessing.store import layout
from preprocessing.store.layout import Rows, read_count_rows, read_counts

_AGAIN = "delete the file and run `hibio prepare` again"


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
    """Read and decode the patches of spots (n,), in any order and repeated: (n, px, px, 3).

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
    """The encoded patches of spots (n,): (position in ``index``, uint8 bytes), in any order."""
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


def _opened(path: Path, how: Callable[[Path], h5py.File]) -> h5py.File:
    try:
        return how(path)
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path} is not a complete HDF5 file ({error}); {_AGAIN}") from error


@lru_cache(maxsize=1024)
def _require_sound(path: Path, inode: int, changed_ns: int, size: int) -> None:
    """Look at all parts of a store: once, as long as its file is the same.

    Raises:
        DataError: see `SlideStore`; it is raised again at the next look.
    """
    with _opened(path, open_guarded) as file:
        try:
            _check(path, file)
        except DataError:
            raise
        except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged attributes ({error}); {_AGAIN}") from error


def _check(path: Path, file: h5py.File) -> None:
    attrs = layout.read_attrs(file)
    found = attrs.get("schema_version")
    if found is None:
        raise DataError(
            f"{path} is an HDF5 file, but not a slide store (no "
            "schema_version); give a file written by `hibio prepare`"
        )
    if found != layout.SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {found}, this program reads version "
            f"{layout.SCHEMA_VERSION}; {_AGAIN}"
        )
    missing = [name for name in layout.REQUIRED if name not in file]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; {_AGAIN}")
    try:
        layout.require_schema(file)
    except DataError as error:
        raise DataError(f"{path}: {error}; {_AGAIN}") from error
    require_plain_name(f"{path}: slide_id", str(attrs.get("slide_id", "")))


class SlideStore:
    """A prepared slide, opened for reading; use it in a ``with`` statement.

    Every method reads from the file; only where rows and patches begin is kept in memory.

    Attributes:
        path: the file.
        attrs: ids, scale, settings and source hashes.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            DataError: missing, truncated, not a store, of another schema version, a part of it is
                not as the schema has it, with values in other files, or its slide_id is no plain
                name (files are named by it).
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist; give a store written by `hibio prepare`")
        now = self.path.stat()
        _require_sound(self.path, now.st_ino, now.st_ctime_ns, now.st_size)
        self._file = _opened(self.path, h5py.File)
        try:
            self.attrs: dict[str, Any] = layout.read_attrs(self._file)
        except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
            self.close()
            raise DataError(f"{self.path}: damaged attributes ({error}); {_AGAIN}") from error
        self._sha256: str | None = None
        self._indptr: np.ndarray | None = None
        self._patch_places: dict[str, PatchPlaces] = {}

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; the store cannot be read any more."""
        self._file.close()
        self._patch_places = {}

    @property
    def slide_id(self) -> str:
        """Name of the slide."""
        return str(self.attrs["slide_id"])

    @property
    def patient_id(self) -> str:
        """Patient; splits are made by it."""
        return str(self.attrs["patient_id"])

    @property
    def modality(self) -> str:
        """What was measured: "rna" (counts) or "protein" (intensities)."""
        return str(self.attrs.get("modality", RNA))

    @property
    def outcome(self) -> str:
        """What is known of the patient's outcome, such as "0" or "1"; "" unknown."""
        return str(self.attrs.get("outcome", ""))

    @property
    def role(self) -> str:
        """What the manifest has the slide for: "train", "test", or "" (as the folds say)."""
        return str(self.attrs.get("role", ""))

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

    def genes(self, ids: str = "gene_id") -> pd.DataFrame:
        """One row a gene, by its name: its id, and `SpotTable.gene_sources` after a gene table."""
        known = {
            name: layout.read_strings(self._file, path)
            for name, path in layout.GENE_SOURCES.items()
            if path in self._file
        }
        return pd.DataFrame({ids: self.gene_ids, **known}, index=pd.Index(self.gene_names))

    @property
    def barcodes(self) -> np.ndarray:
        """Barcodes, (S,) str, along a Hilbert curve of the coordinates."""
        return layout.read_strings(self._file, layout.BARCODE)

    @property
    def xy_um(self) -> np.ndarray:
        """Spot centres in micrometres, (S, 2) float64; DataError when not all are finite."""
        return self._centres(layout.XY_UM)

    @property
    def xy_px0(self) -> np.ndarray:
        """Spot centres in level-0 pixels of the image, (S, 2) float64; DataError as `xy_um`."""
        return self._centres(layout.XY_PX0)

    def _centres(self, name: str) -> np.ndarray:
        xy_S2 = np.asarray(self._file[name][:])
        wrong = int((~np.isfinite(xy_S2)).any(axis=1).sum())
        if wrong:
            raise DataError(
                f"{self.path}: {name} of {wrong} of {len(xy_S2)} spots are not finite; {_AGAIN}"
            )
        return xy_S2

    @property
    def left_out_px0(self) -> np.ndarray:
        """Centres of the spots left out as off tissue, level-0 pixels, (O, 2) float64."""
        known = layout.LEFT_OUT in self._file
        return np.asarray(self._file[layout.LEFT_OUT][:]) if known else np.empty((0, 2))

    @property
    def image_transform(self) -> np.ndarray | None:
        """What took the places of the sources to the image, (3, 3); None: nothing had to."""
        known = self.attrs.get(layout.IMAGE_TRANSFORM)
        return None if known is None else np.array(known, dtype=np.float64)

    @property
    def correction(self) -> str:
        """What ``--fix-registration`` did, in the words of the column image_transform; ""."""
        return str(self.attrs.get(layout.CORRECTION, ""))

    @property
    def warnings(self) -> tuple[SlideWarning, ...]:
        """What may be wrong with the slide, as `hibio prepare` found; () in older stores."""
        return tuple(SlideWarning(*map(str, one)) for one in self.attrs.get("warnings", ()))

    @property
    def tissue_fraction(self) -> np.ndarray:
        """Part of each patch that is tissue, (S,) float32; NaN without image."""
        return np.asarray(self._file[layout.TISSUE_FRACTION][:])

    def counts(self, rows: Rows | None = None) -> csr_matrix:
        """Read the raw counts, or the intensities of proteins.

        Args:
            rows: a slice (one read), (n,) spot numbers in any order, or an (S,) mask; only they
                are read. None: all spots.

        Returns:
            (n, G) CSR, int32 (rna) or float32 (protein).

        Raises:
            DataError: a number outside 0..S-1, or damaged counts.
        """
        try:
            if rows is None:
                return read_counts(self._file)
            if self._indptr is None and not isinstance(rows, slice):
                self._indptr = self._file[layout.COUNTS]["indptr"][:]
            return read_count_rows(self._file, rows, self._indptr)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
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
        return len(self._places(layout.PATCHES).start) if self.has_image else 0

    @property
    def n_context(self) -> int:
        """Number of context patches: S, or 0 without them."""
        return len(self._places(layout.CONTEXT).start) if layout.CONTEXT in self._file else 0

    @property
    def context_um(self) -> float | None:
        """Edge of the context patches in micrometres; None in a store without them."""
        return float(self.attrs["context_um"]) if layout.CONTEXT in self._file else None

    def patches(self, indices: np.ndarray | list[int] | None = None) -> np.ndarray:
        """Read image patches.

        Args:
            indices: (n,) spot numbers in any order, repeats allowed; None: all spots.

        Returns:
            uint8 (n, px, px, 3).

        Raises:
            DataError: no image, a number outside 0..S-1, or damaged bytes.
        """
        return self._pictures(layout.PATCHES, indices)

    def context(self, indices: np.ndarray | list[int] | None = None) -> np.ndarray:
        """Read the context patches: the same spots, pixels and rules, `context_um` wide."""
        return self._pictures(layout.CONTEXT, indices)

    def _pictures(self, group: str, indices: np.ndarray | list[int] | None) -> np.ndarray:
        places = self._places(group)
        spots = len(places.start)
        index = np.arange(spots) if indices is None else np.asarray(indices, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= spots):
            asked = f"patch {int(index.min())}..{int(index.max())} asked, there are 0..{spots - 1}"
            raise DataError(f"{self.path}: {asked}")
        try:
            return read_patches(self._file, places, index)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: {group}: {error}; {_AGAIN}") from error

    def _places(self, group: str) -> PatchPlaces:
        if group in self._patch_places:
            return self._patch_places[group]
        if group not in self._file:
            raise DataError(f"{self.path} has no {layout.ABSENT[group]}")
        try:
            self._patch_places[group] = patch_places(self._file, group)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.path}: damaged {group} ({error}); {_AGAIN}") from error
        return self._patch_places[group]

    @property
    def feature_names(self) -> list[str]:
        """Names of the feature sets, such as "handcrafted"."""
        return sorted(self._file[layout.FEATURES]) if layout.FEATURES in self._file else []

    def features(self, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Return one feature set, (S, F) float32, or (n, F) of some spots.

        Args:
            name: such as "handcrafted".
            rows: a slice, or (n,) spot numbers in any order; only they are read. None: all.

        Raises:
            DataError: there is none of this name (names the nearest), or not all are finite.
        """
        if name not in (names := self.feature_names):
            listed = f"there are: {', '.join(names) or '-'}"
            hint = did_you_mean(name, names, "did you mean", listed)
            raise DataError(f"{self.path} has no features {name!r} ({hint})")
        data = self._file[f"{layout.FEATURES}/{name}"]
        if isinstance(rows, np.ndarray):
            read, place = np.unique(rows, return_inverse=True)
            values = np.asarray(data[read], dtype=np.float32)[place]
        else:
            values = np.asarray(data[slice(None) if rows is None else rows], dtype=np.float32)
        wrong = int((~np.isfinite(values)).any(axis=1).sum())
        if wrong:
            raise DataError(
                f"{self.path}: features {name!r} of {wrong} of {len(values)} spots are not finite; "
                f"compute {name!r} again"
            )
        return values

    @property
    def thumbnail(self) -> np.ndarray | None:
        """The whole slide, uint8 (h, w, 3) of at most 1024 px; None without image."""
        if layout.THUMBNAIL not in self._file:
            return None
        try:
            return layout.decode_jpeg(self._file[layout.THUMBNAIL][:])
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: damaged thumbnail ({error}); {_AGAIN}") from error

    @property
    def thumbnail_downsample(self) -> float | None:
        """Level-0 pixels per thumbnail pixel; None without image."""
        if layout.THUMBNAIL not in self._file:
            return None
        return float(self._file[layout.THUMBNAIL].attrs["downsample"])

    def parts(self) -> dict[str, str]:
        """Checksum of every part of the content; see `layout.part_digests`.

        Raises:
            DataError: damaged, where a part without a checksum has to be read.
        """
        try:
            return layout.part_digests(self._file)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: damaged content ({error}); {_AGAIN}") from error

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        if self._sha256 is None:
            self._sha256 = file_sha256(self.path)
        return self._sha256


def stores_in(folder: str | Path) -> list[Path]:
    """Return the stores (``*.h5``, without hidden files) of a folder, sorted by name; or the one.

    Raises:
        DataError: no such folder, or no store in it.
    """
    folder = Path(folder)
    if folder.suffix == ".h5" and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that `hibio prepare` wrote")
    found = files_in(folder, "*.h5")
    if not found:
        raise DataError(f"{folder} holds no store (*.h5); run `hibio prepare` first")
    return found
