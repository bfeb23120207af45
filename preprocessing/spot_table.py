"""The spots of one slide in memory: counts, genes, coordinates and labels, checked once.

Shapes: S spots, G genes. Level-0 pixels (``px0``) belong to the image file named in the manifest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.findings import SlideWarning
from preprocessing.image_transform import enlarges, moved
from preprocessing.scale import Statement

Modality = Literal["rna", "protein"]
RNA: Modality = "rna"
PROTEIN: Modality = "protein"
MODALITIES: tuple[Modality, ...] = (RNA, PROTEIN)
SOURCE_COLUMNS = ("source_id", "source_name")  # of a gene, before a gene table named it
_CURVE_BITS = 16
_ALIKE, _DEEP, _EVEN = 20, 100.0, 0.01  # spots, mean and deviation of totals that look normalised


@dataclass(frozen=True)
class SpotTable:
    """Counts and places of the spots of one slide (docs/method.md 0: X and P).

    Attributes:
        counts: raw counts, (S, G) int32 CSR, or intensities of proteins, float32; never altered.
        gene_ids: (G,) str, Ensembl ids where the source has them, else the gene names.
        gene_names: (G,) str, unique symbols.
        gene_sources: `SOURCE_COLUMNS` -> (G,) str, what a gene table found each gene under, several
            joined by "|"; empty where none was used.
        barcodes: (S,) str, unique.
        xy_px0: (S, 2) float64, x and y in level-0 pixels of the image file.
        xy_um: (S, 2) float64, x and y in micrometres.
        mpp: um per level-0 pixel of the image file.
        diameter_um: diameter of a spot in um as stated by the source, or None.
        pitch_um: centre-to-centre distance along a row of the array in um as stated, or None.
        labels: (S, columns); string columns are categories (missing: ""), float columns are
            measurements (missing: NaN). Index 0..S-1.
        notes: what the reader left out or renamed, with counts.
        warnings: what may be wrong.
        scale: what was said of mpp, the one taken first; () where places are micrometres.
        image_transform: (3, 3) that took the places to the picture, as the module of that name
            says; None: they were the picture's.
        image_only: nothing was counted, so G is 0; the spots are windows of a slide image.
        modality: "rna" or "protein".
        array: (S, 2) row and column on a Visium array, or None.
        tissue_fraction: (S,) part of each window that is tissue, where it was laid by that.
    """

    counts: csr_matrix
    gene_ids: np.ndarray
    gene_names: np.ndarray
    barcodes: np.ndarray
    xy_px0: np.ndarray
    xy_um: np.ndarray
    mpp: float
    diameter_um: float | None = None
    pitch_um: float | None = None
    labels: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: tuple[str, ...] = ()
    warnings: tuple[SlideWarning, ...] = ()
    scale: tuple[Statement, ...] = ()
    image_only: bool = False
    modality: str = RNA
    image_transform: np.ndarray | None = None
    array: np.ndarray | None = None
    gene_sources: Mapping[str, np.ndarray] = field(default_factory=dict)
    tissue_fraction: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check shapes and values; fill in an empty label table."""
        counts = checked_counts(self.counts, self.modality, self.barcodes, self.gene_names)
        spots, genes = counts.shape
        if spots == 0 or (genes == 0 and not self.image_only):
            raise DataError(
                f"empty matrix: {spots} spots x {genes} genes; expected at least one of each. "
                "Check that the counts and the positions belong to the same slide"
            )
        labels = self.labels
        if labels.shape == (0, 0):
            labels = pd.DataFrame(index=pd.RangeIndex(spots))
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "xy_px0", np.asarray(self.xy_px0, dtype=np.float64))
        object.__setattr__(self, "xy_um", np.asarray(self.xy_um, dtype=np.float64))
        self._check_shapes(spots, genes, labels)
        self._check_values()

    def _check_shapes(self, spots: int, genes: int, labels: pd.DataFrame) -> None:
        expected = {
            "gene_ids": (self.gene_ids.shape, (genes,)),
            "gene_names": (self.gene_names.shape, (genes,)),
            "barcodes": (self.barcodes.shape, (spots,)),
            "xy_px0": (self.xy_px0.shape, (spots, 2)),
            "xy_um": (self.xy_um.shape, (spots, 2)),
            "labels rows": ((len(labels),), (spots,)),
        }
        wrong = [
            f"{k} {found} (expected {want})"
            for k, (found, want) in expected.items()
            if found != want
        ]
        if wrong:
            raise DataError(f"spot table of {spots} spots x {genes} genes: " + ", ".join(wrong))

    def _check_values(self) -> None:
        bad = np.flatnonzero(~np.isfinite(np.hstack([self.xy_px0, self.xy_um])).all(axis=1))
        if len(bad):
            names = ", ".join(map(str, self.barcodes[bad[:3]]))
            raise DataError(
                f"{len(bad)} spots have no finite coordinates (first: {names}); "
                "remove them from the positions file"
            )
        if not (np.isfinite(self.mpp) and self.mpp > 0):
            raise DataError(f"mpp is {self.mpp}; expected a positive number of um per pixel")
        for what, values in (("barcodes", self.barcodes), ("gene names", self.gene_names)):
            repeated = repeated_names(values)
            if repeated:
                raise DataError(
                    f"{len(repeated)} {what} occur more than once (first: {repeated[0]!r}); "
                    f"{what} must be unique within a slide"
                )

    @property
    def n_spots(self) -> int:
        """Number of spots S."""
        return int(self.counts.shape[0])

    def transformed(self, matrix: np.ndarray, said: str) -> "SpotTable":
        """The spots elsewhere on the picture: ``matrix`` (3, 3) after what was done before.

        Where it enlarges, a scale that was said of the coordinates is another one on the picture.
        ``said`` says where the matrix comes from, for the notes.
        """
        known = np.eye(3) if self.image_transform is None else self.image_transform
        xy_px0 = moved(self.xy_px0, matrix)
        factor = enlarges(matrix)
        scale = tuple(
            one if one.of_image else replace(one, mpp=one.mpp / factor) for one in self.scale
        )
        mpp = scale[0].mpp if scale else self.mpp
        diameter = self.diameter_um
        return replace(
            self,
            xy_px0=xy_px0,
            xy_um=xy_px0 * mpp,
            mpp=mpp,
            diameter_um=None if diameter is None else diameter * factor * mpp / self.mpp,
            scale=scale,
            image_transform=matrix @ known,
            notes=(*self.notes, f"places taken to the image by {said}"),
        )

    def take(self, index: np.ndarray) -> "SpotTable":
        """Return the spots ``index`` (integers or a mask, (S',)) in that order.

        Raises:
            DataError: no spot is left.
        """
        names = ("counts", "barcodes", "xy_px0", "xy_um", "array", "tissue_fraction")
        known = {name: getattr(self, name) for name in names}
        return replace(
            self,
            labels=self.labels.iloc[index].reset_index(drop=True),
            **{name: rows[index] for name, rows in known.items() if rows is not None},
        )


def checked_counts(
    counts: csr_matrix,
    modality: str,
    cells: np.ndarray | None = None,
    genes: np.ndarray | None = None,
) -> csr_matrix:
    """Return counts (S, G) as `integer_counts` (rna) or `intensities` (protein) do.

    ``cells`` (S,) and ``genes`` (G,) are the names of rows and columns, for messages.

    Raises:
        DataError: unknown modality, or a value that the modality does not allow.
    """
    if modality not in MODALITIES:
        raise DataError(f"modality {modality!r} is unknown; choose {' or '.join(MODALITIES)}")
    return (intensities if modality == PROTEIN else integer_counts)(counts, cells, genes)


def integer_counts(
    counts: csr_matrix, cells: np.ndarray | None = None, genes: np.ndarray | None = None
) -> csr_matrix:
    """Return ``counts`` as canonical int32 CSR (sorted, summed, no stored zeros); a copy if needed.

    Raises:
        DataError: a value is negative, not an integer or above the int32 range.
    """
    matrix = csr_matrix(counts)
    data = matrix.data
    if data.dtype == np.int32 and (data.size == 0 or data.min() > 0):
        return matrix if matrix.has_canonical_format else _canonical(matrix, data.copy())
    whole = whole_counts(data)
    if not whole.all():
        raise DataError(
            f"{int((~whole).sum())} counts are not non-negative integers "
            f"(first: {_first(matrix, ~whole, cells, genes)}); "
            "give the raw counts, not normalised or log-transformed values; for intensities of "
            f"proteins write {PROTEIN!r} into the manifest column modality (modality: protein)"
        )
    return _canonical(matrix, data.astype(np.int32))


def native_numbers(values: np.ndarray) -> np.ndarray:
    """Numbers as scipy takes them: bytes of this machine, float16 as float32, float128 as 64."""
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        return values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def whole_counts(data: np.ndarray) -> np.ndarray:
    """Tell which values are whole numbers from 0 to the int32 range, (n,) bool."""
    with np.errstate(invalid="ignore"):
        whole = (data >= 0) & (data <= np.iinfo(np.int32).max)
        return np.asarray(whole & (np.mod(data, 1) == 0) if data.dtype.kind == "f" else whole)


def even_total(counts: csr_matrix) -> float | None:
    """The median total of a spot, where all spots (S, G) have nearly the same; else None.

    Counts never have: normalised values do, also rounded ones.
    """
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    totals = totals[totals > 0]
    if len(totals) < _ALIKE or totals.mean() < _DEEP or totals.std() > _EVEN * totals.mean():
        return None
    return float(np.median(totals))


def allowed_values(data: np.ndarray, modality: str) -> bool:
    """Tell whether all values (n,) are counts (rna), or finite numbers from 0 on (protein)."""
    if modality == PROTEIN:
        return bool((np.isfinite(data) & (data >= 0)).all())
    return bool(whole_counts(data).all())


def intensities(
    counts: csr_matrix, cells: np.ndarray | None = None, genes: np.ndarray | None = None
) -> csr_matrix:
    """Return intensities as canonical float32 CSR (sorted, summed, no stored zeros).

    Raises:
        DataError: a value is negative or not finite.
    """
    matrix = csr_matrix(counts)
    data = matrix.data
    fine = data.size == 0 or (data.min() > 0 and np.isfinite(data.max()))  # NaN: False
    if fine and data.dtype == np.float32 and matrix.has_canonical_format:
        return matrix
    with np.errstate(invalid="ignore", over="ignore"):
        narrow = data.astype(np.float32)
        good = np.isfinite(narrow) & (data >= 0)
    if not good.all():
        raise DataError(
            f"{int((~good).sum())} intensities are not finite numbers from 0 on "
            f"(first: {_first(matrix, ~good, cells, genes)}); give the intensities as measured, "
            "not z-scores or log ratios, and remove cells without a measurement"
        )
    return _canonical(matrix, narrow)


def _canonical(matrix: csr_matrix, data: np.ndarray) -> csr_matrix:
    result = csr_matrix((data, matrix.indices.copy(), matrix.indptr.copy()), matrix.shape)
    result.sum_duplicates()
    result.eliminate_zeros()
    return result


def _first(
    matrix: csr_matrix, bad: np.ndarray, cells: np.ndarray | None, genes: np.ndarray | None
) -> str:
    """Name the first bad value, its cell and its gene where they are known."""
    place = int(np.flatnonzero(bad)[0])
    row = int(np.searchsorted(matrix.indptr, place, side="right")) - 1
    column = int(matrix.indices[place])
    known = [f"{matrix.data[place]}"]
    if cells is not None and len(cells) == matrix.shape[0]:
        known.append(f"cell {str(cells[row])!r}")
    if genes is not None and len(genes) == matrix.shape[1]:
        known.append(f"{str(genes[column])!r}")
    return ", ".join(known)


def repeated_names(names: np.ndarray) -> list[str]:
    """Return the names that occur more than once, sorted."""
    index = pd.Index([str(name) for name in names], dtype=object)
    return sorted(index[index.duplicated()].unique())


def unique_names(names: Sequence[str]) -> tuple[np.ndarray, int]:
    """Make names unique by adding "-1", "-2", ... to the later ones; also how many were renamed."""
    if len(set(names)) == len(names):
        return np.array(list(names), dtype=object), 0
    taken = set(names)
    seen: set[str] = set()
    result, renamed = [], 0
    for name in names:
        new, number = name, 0
        while new in seen or (number and new in taken):
            number += 1
            new = f"{name}-{number}"
        renamed += new != name
        seen.add(new)
        result.append(new)
    return np.array(result, dtype=object), renamed


def unique_gene_names(names: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return `unique_names` of genes (G,), and note how many were renamed."""
    unique, renamed = unique_names(names.tolist())
    if renamed:
        notes.append(f"{renamed} repeated gene names got an ending '-1', '-2', ...")
    return unique


def hilbert_order(xy_um: np.ndarray) -> np.ndarray:
    """Order (S,) of the spots along a Hilbert curve, so that neighbours lie close in the file.

    Coordinates (S, 2) in any unit; ties keep their order.
    """
    low = xy_um.min(axis=0)
    span = max(float((xy_um - low).max()), np.finfo(float).tiny)
    cell = np.floor((xy_um - low) / span * (2**_CURVE_BITS - 1)).astype(np.int64)
    x, y = cell[:, 0], cell[:, 1]
    distance = np.zeros(len(cell), dtype=np.int64)
    for bit in range(_CURVE_BITS - 1, -1, -1):
        side = 1 << bit
        right, upper = (x & side) > 0, (y & side) > 0
        distance += side * side * ((3 * right.astype(np.int64)) ^ upper)
        mirrored = ~upper & right
        x, y = np.where(mirrored, side - 1 - x, x), np.where(mirrored, side - 1 - y, y)
        x, y = np.where(upper, x, y) & (side - 1), np.where(upper, y, x) & (side - 1)
    return np.argsort(distance, kind="stable").astype(np.int64)
