"""First-generation Spatial Transcriptomics: a counts table with rows "XxY" and a spot table."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.files import files_in, folder_part
from preprocessing.readers.coordinates import row_mpp, row_step, step_px
from preprocessing.readers.format import NO_BINS, Format, first_file, image_named, is_text
from preprocessing.readers.joins import first_names
from preprocessing.readers.labels import labels_of, position_names
from preprocessing.readers.tables import (
    number_column,
    open_text,
    read_table,
    require_columns,
    text_head,
    truth_column,
)
from preprocessing.scale import IMAGE_FILE, Statement, require_scale, stated
from preprocessing.sections import several_sections
from preprocessing.slide_row import SlideRow, drafted_row
from preprocessing.spot_table import SpotTable, integer_counts, unique_gene_names

ST_PITCH_UM = 200.0  # 1,000-spot arrays: neighbouring array positions
CHECKERBOARD_PITCH_UM = 100.0  # every other position used: diagonal neighbours 141 um apart
_POSITION = re.compile(r"\d+x\d+")
_PIXELS = ("pixel_x", "pixel_y")
_SPOT_COLUMNS = ("x", "y", *_PIXELS)
_FACTOR = "image_over_fullres_scale"
_COUNTS = re.compile(r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]*?)\.tsv(\.gz)?")


def read_legacy_st(row: SlideRow, image_mpp: float | None = None) -> SpotTable:
    """Read one legacy ST slide.

    mpp of the image: manifest mpp, else pitch_um / (median pixel step per array unit), else the
    image file's own. Only spots with ``selected`` = 1 (where the column exists) and counts stay.
    """
    if row.spots is None:
        raise DataError("format legacy_st needs the column 'spots' (table x y pixel_x pixel_y)")
    counts, names, genes, notes = read_count_table(row.counts_path)
    array, pixel, selected = _read_spots(row.spots)
    scale = 1.0 if row.image_scale is None else row.image_scale
    said = _scale(row, array, pixel * scale, image_mpp)
    mpp = said[0].mpp
    keys = position_names(array)
    if not selected.all():
        notes.append(f"{int((~selected).sum())} spots not selected in {row.spots.name} left out")
    place = pd.Index(names).get_indexer(keys)
    if (selected & (place < 0)).any():
        missing = int((selected & (place < 0)).sum())
        notes.append(f"{missing} spots of {row.spots.name} without counts left out")
    extra = int((~pd.Index(names).isin(keys)).sum())
    if extra:
        notes.append(f"{extra} rows of {row.counts_path.name} without a spot left out")
    kept = np.flatnonzero(selected & (place >= 0))
    if len(kept) == 0:
        raise DataError(
            f"no row of {row.counts} belongs to a selected spot of {row.spots} (rows are "
            f"{first_names(names)}; spots are {first_names(keys)})"
        )
    labels = labels_of(row, keys[kept], notes, array[kept])
    xy_px0 = pixel[kept] * scale
    return SpotTable(
        counts=counts[place[kept]],
        gene_ids=genes,
        gene_names=genes.copy(),
        barcodes=keys[kept],
        xy_px0=xy_px0,
        xy_um=xy_px0 * mpp,
        mpp=mpp,
        scale=said,
        pitch_um=row.pitch_um and row.pitch_um * row_step(array),
        labels=labels,
        notes=tuple(notes),
    )


def read_count_table(path: Path) -> tuple[csr_matrix, np.ndarray, np.ndarray, list[str]]:
    """Read a tab-separated counts table, spots "XxY" x genes (or turned round).

    Args:
        path: text, gzipped or not; the header's first cell may be empty or absent.

    Returns:
        (S, G) int32 CSR, (S,) row names, (G,) unique gene names, notes.

    Raises:
        DataError: names the file and the line that is not as expected.
    """
    with open_text(path) as text:
        header = text.readline().rstrip("\r\n").split("\t")
        names: list[str] = []
        blocks: list[tuple[np.ndarray, np.ndarray]] = []
        columns = 0
        for number, line in enumerate(text, start=2):
            if not line.strip():
                continue
            name, _, rest = line.rstrip("\r\n").partition("\t")
            if not names:
                columns = _gene_count(path, header, rest)
            names.append(name.strip().strip('"'))
            blocks.append(_sparse_line(path, number, rest, columns))
    if not names:
        raise DataError(f"empty matrix: {path} has no rows below the header")
    sizes = np.array([len(index) for index, _ in blocks])
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    data = np.concatenate([values for _, values in blocks])
    indices = np.concatenate([index for index, _ in blocks])
    counts = integer_counts(csr_matrix((data, indices, indptr), (len(names), columns)))
    return _oriented(path, counts, names, [g.strip().strip('"') for g in header[-columns:]])


def _gene_count(path: Path, header: list[str], rest: str) -> int:
    columns = rest.count("\t") + 1 if rest else 0
    if columns == 0 or len(header) not in (columns, columns + 1):
        raise DataError(
            f"{path}: the header has {len(header)} cells and the first row {columns} values; "
            "expected a tab-separated table, rows 'XxY' and one column a gene"
        )
    return columns


def _sparse_line(path: Path, number: int, rest: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the non-zero columns and values of one line; integers fast, other numbers slowly."""
    cells = rest.count("\t") + 1
    if cells != columns:
        raise DataError(
            f"{path}, line {number}: {cells} values, expected {columns}; the file is truncated "
            "or not tab-separated"
        )
    values = _parse_integers(rest)
    if values is None or len(values) != columns:
        try:
            values = np.array(rest.split("\t"), dtype=np.float64)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {error}; expected raw counts separated by tabs"
            ) from error
    index = np.flatnonzero(values)
    return index, values[index]


def _parse_integers(text: str) -> np.ndarray | None:
    if " " in text:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy 1 stops at a point and warns
        try:
            return np.fromstring(text, dtype=np.int64, sep="\t")
        except (ValueError, DeprecationWarning):
            return None


def _oriented(
    path: Path, counts: csr_matrix, names: list[str], columns: list[str]
) -> tuple[csr_matrix, np.ndarray, np.ndarray, list[str]]:
    """Turn a genes x spots table round; check the spot names and make gene names unique."""
    notes = []
    if not all(map(_POSITION.fullmatch, names)):
        if not all(map(_POSITION.fullmatch, columns)):
            bad = next(n for n in names if not _POSITION.fullmatch(n))
            raise DataError(
                f"{path}: row {bad!r} is not an array position; expected names like "
                "'10x13' (x and y of the spot table)"
            )
        names, columns = columns, names
        counts = counts.T.tocsr()
        notes.append("counts were genes x spots; turned round")
    if len(set(names)) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise DataError(f"{path}: spot {twice!r} occurs twice; keep one row a spot")
    genes = unique_gene_names(np.array(columns, dtype=object), notes)
    return counts, np.array(names, dtype=object), genes, notes


def _read_spots(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return array positions (S, 2) int64, pixels (S, 2) float64 and selected (S,) bool."""
    frame = read_table(path, ids=lambda names: ())
    require_columns(frame, _SPOT_COLUMNS, path)
    if frame.empty:
        raise DataError(f"{path} lists no spots below the header")
    x, y, pixel_x, pixel_y = (number_column(frame, c, path) for c in _SPOT_COLUMNS)
    array = np.column_stack([x, y])
    if (np.rint(array) != array).any() or np.abs(array).max() > 1e6:
        raise DataError(f"{path}: x and y must be whole array positions (measured: new_x, new_y)")
    selected = np.ones(len(frame), dtype=bool)
    if "selected" in frame.columns:
        selected = truth_column(frame, "selected", path)
    array = array.astype(np.int64)
    pixel = np.column_stack([pixel_x, pixel_y])
    found = several_sections(
        pixel[selected], frame.iloc[:, :0], position_names(array), array=array, spots=True
    )
    if found:
        raise found.error(path)
    return array, pixel, selected


def _scale(
    row: SlideRow, array: np.ndarray, pixel: np.ndarray, image_mpp: float | None
) -> tuple[Statement, ...]:
    """Um per pixel of the image; ``pixel`` are image pixels (S, 2)."""
    step = None if row.pitch_um is None else step_px(array, pixel)
    if row.pitch_um is not None and not step and row.mpp is None:
        raise DataError(
            f"{row.spots}: too few neighbouring spots to turn pitch_um into mpp; give the "
            "column mpp (um per image pixel)"
        )
    pitch = row.pitch_um / step if row.pitch_um and step else None
    return require_scale(
        (
            *row_mpp(row),
            *stated(pitch, "the manifest column pitch_um over the array's step", decides=True),
            *stated(image_mpp, IMAGE_FILE, of_image=True),
        ),
        "give one of these manifest columns: pitch_um (um per array unit: 200 for 1,000-spot ST "
        "arrays, 100 for checkerboard arrays) or mpp (um per image pixel)",
    )


def _detect(counts: Path, spots: Path | None) -> bool:
    if spots is None or not is_text(counts):
        return False
    head = text_head(spots)
    return all(column in head for column in _PIXELS)


def _discover(folder: Path) -> list[SlideRow]:
    return [*_her2st(folder), *_her2st_clone(folder), *_alignment_tables(folder)]


def _slides(
    folder: Path, spot_folder: Path, spot_name: str, pitch_um: float
) -> Iterator[tuple[str, SlideRow]]:
    """Slides with counts <id>.tsv(.gz) in one folder and spots ``spot_name`` in another."""
    if not folder.is_dir():
        return
    for counts in files_in(folder):
        match = _COUNTS.fullmatch(counts.name)
        slide = match["id"] if match else ""
        spots = first_file(spot_folder, f"{spot_name.format(slide)}.tsv*") if slide else None
        if spots is not None:
            known = {"spots": spots, "technology": "Spatial Transcriptomics"}
            yield slide, drafted_row(slide, counts, "legacy_st", pitch_um=pitch_um, **known)


def _her2st(folder: Path) -> list[SlideRow]:
    """The folder counts/ + spotfiles/ (+ images/, pathologist_labels/, sections.csv)."""
    rows = []
    found = list(_slides(folder / "counts", folder / "spotfiles", "{}_selection", ST_PITCH_UM))
    sections = _sections(folder / "sections.csv") if found else {}
    for slide, row in found:
        known = sections.get(slide, {})
        named = known.get("image")
        image = folder / named if named else image_named(folder / "images", slide)
        scale = known.get(_FACTOR, "")
        rows.append(
            replace(
                row,
                patient_id=folder_part(known.get("patient") or _her2st_patient(slide)),
                image=image,
                image_scale=float(scale) if image is not None and scale else None,
                labels=_labels(folder / "pathologist_labels", slide),
            )
        )
    return rows


def _her2st_patient(slide: str) -> str:
    """Patient of a section of HER2ST, which names them A1, A2, B1: the letter; else the section."""
    return slide[0] if re.fullmatch(r"[A-Z]\d", slide) else slide


def _labels(folder: Path, slide: str) -> Path | None:
    return first_file(folder, f"{slide}_labeled_coordinates.tsv*")


def _sections(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    frame = read_table(path, ids=lambda names: [name for name in names if name != _FACTOR])
    require_columns(frame, ("section", "patient"), path)
    records = frame.to_dict("records")
    return {str(r["section"]): {str(k): str(v) for k, v in r.items()} for r in records}


def _her2st_clone(folder: Path) -> list[SlideRow]:
    """The folder ``data`` of a clone of almaan/her2st."""
    found = _slides(folder / "ST-cnts", folder / "ST-spotfiles", "{}_selection", ST_PITCH_UM)
    return [
        replace(
            row,
            patient_id=_her2st_patient(slide),
            image=image_named(folder / "ST-imgs" / slide[0] / slide, "*"),
            labels=_labels(folder / "ST-pat" / "lbl", slide),
        )
        for slide, row in found
    ]


def _alignment_tables(folder: Path) -> list[SlideRow]:
    """Counts ``<id>.tsv(.gz)``, ``alignment_table_<id>.tsv`` and ``<id>.jpg`` in one folder."""
    found = _slides(folder, folder, "alignment_table_{}", CHECKERBOARD_PITCH_UM)
    return [replace(row, image=image_named(folder, slide)) for slide, row in found]


FORMAT = Format(
    "legacy_st",
    read_legacy_st,
    detect=_detect,
    discover=_discover,
    layout="counts/ + spotfiles/, ST-cnts/ + ST-spotfiles/, alignment_table_*.tsv",
    needs={"spots": "spot table"},
    forbids={**NO_BINS, "section": "holds one section"},
    no_protein="holds RNA; for a table of proteins use format csv",
)
