"""One slide is one section: what shows that a table holds several, and how to take one of them.

Sections laid over one another give wrong neighbours, regions and patches in silence. Shapes: S
spots.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from preprocessing.errors import DataError, did_you_mean

_THINGS = ("sample", "section", "slide", "tissue_section", "capture_area", "puck", "array")
_BEINGS = ("donor", "patient", "individual", "subject", "specimen", "animal", "mouse")
#: Words in names of columns, without case and what joins them.
_SECTION = {
    name.replace("_", "") + end
    for name in (*_THINGS, *_BEINGS, "library")
    for end in ("", "id", "name", "no", "number")
} | {"batch", "origident", "replicate", "run"}
ARRAY = ("array_row", "array_col")
SUFFIX = "suffix"  # what stands behind the last hyphen of a barcode, as a column
_MOST, _FEWEST = 100, 4  # values of a column that tells sections apart; spots a value
_COINCIDING = 0.25  # part of the spots; fewer are cells whose centres were rounded
_MIXED = 0.3  # of the neighbours of another section that two laid at random would have
_ASKED = 2000
_JOINS = re.compile(r"[\s._-]+")
_BASES = re.compile(r"[ACGTN]{14,}")  # of a barcode that stands once on an array


def is_library(name: object) -> bool:
    """Whether a column says the capture area, by its name, as scanpy and squidpy call it."""
    return _plain(name) in ("library", "libraryid")


def _plain(name: object) -> str:
    return _JOINS.sub("", str(name)).lower()


@dataclass(frozen=True)
class Several:
    """Several sections in one table.

    Attributes:
        evidence: what shows it.
        column: the column that tells them apart, or `SUFFIX`; "" where none does.
        sizes: its values, with their numbers of spots.
    """

    evidence: str
    column: str
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        """Return what was found, as a sentence without an end."""
        told = f"it holds several sections, and a slide is one section: {self.evidence}"
        if not self.column:
            return f"{told}; no column tells them apart"
        parts = ", ".join(f"{value}: {count} spots" for value, count in self.sizes.items())
        return f"{told}; the column {self.column!r} tells them apart ({parts})"

    def error(self, where: object) -> DataError:
        """The error of a reader: names the manifest column that takes one section."""
        if not self.column:
            fix = "write each section into a file of its own, or keep one row a spot"
        else:
            first = f"{self.column}={next(iter(self.sizes))}"
            fix = (
                f"write one row a section, each with the manifest column section, such as {first} "
                "(`hibio manifest` drafts them)"
            )
        return DataError(f"{where}: {self}; {fix}")


def several_sections(
    xy: NDArray[np.float64],
    columns: pd.DataFrame,
    barcodes: NDArray[np.object_],
    libraries: Collection[str] = (),
    *,
    array: NDArray[np.int64] | None = None,
    spots: bool = False,
) -> Several | None:
    """Look whether a table holds more than one section.

    It does where a column of libraries has several values (or the file several libraries, and no
    column says which of them this is), an array position occurs twice, spots lie at one place (of
    cells: more than 25 percent), the values of a column named like a section's (or a patient's)
    are mixed in space, or more than 25 percent of the barcodes occur again but for their ends.

    Args:
        xy: (S, 2) places, any unit.
        columns: (S, ...) what is said of a spot.
        barcodes: (S,).
        libraries: names in uns['spatial'].
        array: (S, 2) positions on the array; None: those of the columns, if they are there.
        spots: an array's, no two of which can lie at one place.
    """
    if array is None and set(ARRAY) <= set(columns.columns):
        array = columns[list(ARRAY)].to_numpy()
    for name in map(str, filter(is_library, columns.columns)):
        sizes = _sizes(columns[name])
        if len(sizes) > 1:
            return Several(f"{len(sizes)} libraries in the column {name!r}", name, sizes)
        if set(sizes) <= set(map(str, libraries)):
            libraries = ()
    found = _overlaid(xy, array, spots or array is not None, columns, barcodes)
    if found is None and len(libraries) > 1:
        told = f"libraries {', '.join(map(str, libraries))} in uns['spatial']"
        found = Several(told, *_telling(xy, columns, barcodes))
    return found


def _overlaid(
    xy: NDArray[np.float64],
    array: NDArray[np.int64] | None,
    spots: bool,
    columns: pd.DataFrame,
    barcodes: NDArray[np.object_],
) -> Several | None:
    """Whether places say that sections lie over one another."""
    twice = 0 if array is None else _repeats(array)
    if array is not None and twice:
        told = f"{twice} positions of the array (array_row, array_col) are taken more than once"
        return Several(told, *_telling(array, columns, barcodes))
    known = xy[np.isfinite(xy).all(axis=1)]
    twice = 0 if (known == known[:1]).all() else _repeats(known)  # all at one place: no places
    if twice > (0 if spots else _COINCIDING * len(xy)):
        told = f"{twice} spots lie where another one lies"
        return Several(told, *_telling(xy, columns, barcodes))
    for name in columns.columns:
        if _plain(name) in _SECTION and _mixed(xy, columns[name]):
            told = f"the values of the column {name!r} lie over one another"
            return Several(told, str(name), _sizes(columns[name]))
    return _barcodes_again(columns, barcodes)


def _barcodes_again(columns: pd.DataFrame, barcodes: NDArray[np.object_]) -> Several | None:
    """Whether barcodes occur again with something else around them, as tables are joined."""
    if not pd.Index(barcodes).is_unique:
        return None  # rows written twice: the reader says so
    bases = [found[0] if (found := _BASES.search(str(name))) else str(name) for name in barcodes]
    code = pd.factorize(np.array(bases, dtype=object))[0]
    key = np.column_stack([code, np.zeros_like(code)])
    twice = _repeats(key)
    if twice <= _COINCIDING * len(barcodes):
        return None
    told = f"{twice} barcodes occur again, but for what stands around their bases"
    return Several(told, *_telling(key, columns, barcodes))


def suffixes(barcodes: NDArray[np.object_]) -> NDArray[np.object_]:
    """What stands behind the last hyphen of each barcode, (S,) str; "" where there is none."""
    return np.array([str(name).rpartition("-")[2] if "-" in str(name) else "" for name in barcodes])


def several_gems(barcodes: NDArray[np.object_]) -> Several | None:
    """Several libraries by the endings -1, -2, ... that `spaceranger aggr` gives to barcodes."""
    sizes = _sizes(pd.Series(suffixes(barcodes)))
    if len(sizes) < 2 or not all(value.isdigit() for value in sizes):
        return None
    told = f"barcodes end in -{' and -'.join(sizes)}, as `spaceranger aggr` writes them"
    return Several(told, SUFFIX, sizes)


def section_mask(
    section: str, columns: pd.DataFrame, barcodes: NDArray[np.object_], where: object
) -> NDArray[np.bool_]:
    """Tell which spots are of the section that a manifest row names, (S,).

    Args:
        section: "COLUMN=VALUE"; "suffix=2": barcodes that end in -2; "": all.
        columns: (S, ...).
        barcodes: (S,).
        where: the file, for the message.

    Raises:
        DataError: no such column, or no spot with this value; lists what there is.
    """
    if not section:
        return np.ones(len(barcodes), dtype=bool)
    name, _, value = section.partition("=")
    if name != SUFFIX and name not in columns.columns:
        there = [str(one) for one in columns.columns]
        hint = did_you_mean(name, there, "; did you mean", f"; it has {', '.join(there[:12])}")
        raise DataError(f"{where}: section {section!r}: there is no column {name!r}{hint}")
    found = pd.Series(suffixes(barcodes)) if name == SUFFIX else columns[name]
    mask = np.asarray(found.astype(str).to_numpy() == value)
    if not mask.any():
        listed = ", ".join(list(_sizes(found))[:12])
        raise DataError(f"{where}: section {section!r}: the values of {name!r} are {listed}")
    return mask


def _sizes(values: pd.Series) -> dict[str, int]:
    """The values of a column and how often they occur, in their order in the file."""
    texts = values.astype(object).where(values.notna(), "").astype(str)
    return {str(name): int(count) for name, count in texts.value_counts(sort=False).items()}


def _repeats(key: NDArray[np.float64] | NDArray[np.int64]) -> int:
    """How many rows of (S, 2) come after an equal one."""
    return int(pd.DataFrame(np.asarray(key)).duplicated().sum())


def _candidates(
    columns: pd.DataFrame, barcodes: NDArray[np.object_]
) -> Iterator[tuple[str, pd.Series]]:
    """Columns of few values: those named like a section's first, then others, then suffixes."""
    named = sorted(columns.columns, key=lambda name: _plain(name) not in _SECTION)
    for name in named:
        values = columns[name]
        measured = values.dtype.kind == "f" and (np.mod(values, 1) != 0).any()
        if not measured and 1 < values.nunique() <= min(_MOST, len(values) // _FEWEST):
            yield str(name), values
    yield SUFFIX, pd.Series(suffixes(barcodes))


def _telling(
    key: NDArray[np.float64] | NDArray[np.int64],
    columns: pd.DataFrame,
    barcodes: NDArray[np.object_],
) -> tuple[str, dict[str, int]]:
    """The first column within whose values no row of ``key`` (S, 2) occurs twice."""
    for name, values in _candidates(columns, barcodes):
        sizes = _sizes(values)
        texts = values.astype(str).to_numpy()
        frame = pd.DataFrame(np.asarray(key)).assign(section=texts)
        if 1 < len(sizes) <= _MOST and not frame.duplicated().any():
            return name, sizes
    return "", {}


def _mixed(xy: NDArray[np.float64], values: pd.Series) -> bool:
    """Whether the nearest neighbours of spots are often of another value of a column."""
    code, names = pd.factorize(values.astype(str).to_numpy())
    if not 1 < len(names) <= _MOST or len(xy) < 20 or not np.isfinite(xy).all():
        return False
    asked = np.linspace(0, len(xy) - 1, min(len(xy), _ASKED)).astype(np.int64)
    near = cKDTree(xy).query(xy[asked], k=2)[1][:, 1]
    expected = 1 - float(((np.bincount(code) / len(code)) ** 2).sum())
    return bool((code[near] != code[asked]).mean() > _MIXED * expected)
