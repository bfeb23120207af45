"""The manifest: one CSV row a slide, naming its files and what is known about it.

Only scale factors and the header of a spot table are opened.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import atomic_path, require_folder_part, require_plain_name
from preprocessing.format_detection import detect_format
from preprocessing.spot_table import MODALITIES, PROTEIN, RNA

IMAGE_ONLY = "image"  # a slide without counts

VISIUM_HD = "visium_hd"

HEST = "hest"

HD_CELLS = "visium_hd_cells"

CELL_FORMATS = ("h5ad", "loom", "csv", "xenium", "cosmx", "spatialdata", HD_CELLS)

FORMATS = ("visium", VISIUM_HD, "legacy_st", HEST, *CELL_FORMATS, IMAGE_ONLY)

BINS_UM = (2.0, 8.0, 16.0)  # what Space Ranger writes of a Visium HD slide

REQUIRED = ("slide_id", "patient_id", "counts")

PATH_COLUMNS = ("counts", "image", "spots", "labels")

_NUMBERS = ("mpp", "image_scale", "pitch_um", "bin_um")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a manifest; the columns of the CSV carry the same names.

    Attributes:
        slide_id: plain name [A-Za-z0-9._-]; names the store file.
        patient_id: splits are made by patient.
        counts: Space Ranger folder or matrix (visium, visium_hd, visium_hd_cells), output folder
            (xenium, cosmx), zarr folder (spatialdata), root of HEST-1k or its st/<id>.h5ad (hest),
            or one file (legacy_st, h5ad, loom, csv); None (image).
        format: one of `FORMATS` (empty in the manifest: by `detect_format`); "csv" is any table of
            cells x genes, "image" a slide without counts: its spots are a square grid of windows
            over the tissue.
        image: slide image (image: required); None gives a counts-only store.
        spots: spot table (legacy_st: required; visium: instead of spatial/tissue_positions*);
            table of cells with coordinates (csv).
        labels: table with labels or measurements per spot.
        mpp: um per level-0 pixel of the image file named; without image um per coordinate unit.
        image_scale: image pixels per coordinate pixel; None: 1, or for Space Ranger by the names
            tissue_hires_image / tissue_lowres_image.
        pitch_um: centre-to-centre distance in um of one array step (legacy ST: 200 or 100), of
            the grid (image; None: as wide as a patch), or of the square pseudo-spots into which
            cells are summed (tables of cells; None: cells stay).
        tissue: free text.
        organism: free text, such as "human".
        technology: free text, such as "Visium".
        modality: "rna" (counts, integers) or "protein" (intensities from 0 on).
        outcome: a class such as "1", or a survival time "34.5;1" (time;event); "" unknown; the
            same on all slides of a patient.
        bin_um: edge of the bins to read in um (visium_hd: one of `BINS_UM`; None: 8).
    """

    slide_id: str
    patient_id: str
    counts: Path | None
    format: str
    image: Path | None = None
    spots: Path | None = None
    labels: Path | None = None
    mpp: float | None = None
    image_scale: float | None = None
    pitch_um: float | None = None
    tissue: str = ""
    organism: str = ""
    technology: str = ""
    modality: str = RNA
    outcome: str = ""
    bin_um: float | None = None

    @property
    def counts_path(self) -> Path:
        """The counts, for the readers of formats that have some; DataError where there are none."""
        if self.counts is None:
            raise DataError(f"format {self.format} needs the column 'counts'; it is empty")
        return self.counts


COLUMNS = tuple(f.name for f in fields(SlideRow))


def parse_row(
    number: int, header: list[str], cells: list[str], base: Path
) -> tuple[SlideRow | None, list[str]]:
    """Parse one row.

    Args:
        number: line in the file, for the messages.
        header: column names.
        cells: the texts of the row.
        base: folder that relative paths start from.

    Returns:
        The row, or None where it cannot be used, and one sentence for each problem.
    """
    if len(cells) != len(header):
        return None, [f"row {number}: {len(cells)} cells, the header has {len(header)}"]
    values = dict(zip(header, cells, strict=True))
    problems: list[str] = []
    parsed: dict[str, object] = {}
    for name, text in values.items():
        try:
            parsed[name] = _PARSERS.get(name, _text)(name, text, base)
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if not values.get("format"):
        told = _detected(parsed)
        parsed["format"] = told
        if told is None:
            problems.append(f"row {number}: {_unknown_format(values)}")
    problems += [f"row {number}: {text}" for text in _misfits(parsed, values)]
    if problems:
        return None, problems
    return SlideRow(**parsed), []  # type: ignore[arg-type]


def _detected(parsed: Mapping[str, object]) -> str | None:
    """The format that the files of a row show; None where they show none."""
    paths = (parsed.get(name) for name in ("counts", "image", "spots"))
    counts, image, spots = (path if isinstance(path, Path) else None for path in paths)
    return detect_format(counts, image, spots)


def _unknown_format(values: Mapping[str, str]) -> str:
    if not values["counts"]:
        return "it names neither counts nor an image; fill one of them"
    return (
        f"the format of {values['counts']} does not show; check the path, or write one of "
        f"{', '.join(FORMATS)} into the column format"
    )


def _misfits(parsed: Mapping[str, object], values: Mapping[str, str]) -> list[str]:
    """What the format asks of the other columns, and they do not give."""
    if parsed.get("format") == IMAGE_ONLY:
        problems = [
            f"format image lays its own grid; leave the column {name!r} empty"
            for name in ("counts", "spots", "image_scale", "bin_um")
            if values.get(name)
        ]
        if parsed.get("modality") == PROTEIN:
            problems.append("format image measures nothing; leave the column 'modality' empty")
        if not values.get("image"):
            problems.append("format image needs the column 'image' (slide image)")
        return problems
    problems = []
    if parsed.get("format") and not values["counts"]:
        problems.append("counts is empty; a slide without counts has the format 'image'")
    if parsed.get("format") == "legacy_st":
        if not values.get("spots"):
            problems.append("format legacy_st needs the column 'spots' (spot table)")
        if parsed.get("modality") == PROTEIN:
            problems.append("format legacy_st holds RNA; for a table of proteins use format csv")
    if parsed.get("format") in (*CELL_FORMATS, HEST):
        problems += _cell_misfits(str(parsed["format"]), values)
    return problems + _bin_misfits(parsed, values)


def _bin_misfits(parsed: Mapping[str, object], values: Mapping[str, str]) -> list[str]:
    """Bins and pitch of a format that has, or has not, a fixed grid."""
    form = parsed.get("format")
    if form == VISIUM_HD:
        problems = []
        if values.get("pitch_um"):
            problems.append("format visium_hd has bins; give bin_um and leave pitch_um empty")
        if parsed.get("bin_um") not in (None, *BINS_UM):
            known = ", ".join(f"{value:g}" for value in BINS_UM)
            problems.append(f"bin_um is {values.get('bin_um')}; Visium HD has bins of {known} um")
        return problems
    if form is not None and values.get("bin_um"):
        return [f"format {form} has no bins of Visium HD; leave the column 'bin_um' empty"]
    return []


def _cell_misfits(form: str, values: Mapping[str, str]) -> list[str]:
    """Columns that would be ignored for a table of cells."""
    problems = []
    if values.get("spots") and form != "csv":
        problems.append(f"format {form} brings its own coordinates; leave the column 'spots' empty")
    if form == HEST and values.get("pitch_um"):
        problems.append("format hest holds spots already; leave the column 'pitch_um' empty")
    if values.get("image_scale") and not values.get("image"):
        problems.append("image_scale is given without image; leave it empty or name the image")
    return problems


def _text(name: str, text: str, base: Path) -> str:
    return text


def _plain_name(name: str, text: str, base: Path) -> str:
    return require_plain_name(name, text)


def _patient(name: str, text: str, base: Path) -> str:
    if not text:
        raise ValueError(f"{name} is empty; every slide needs one")
    return require_folder_part(name, text)


def _path(name: str, text: str, base: Path) -> Path | None:
    if "\0" in text:
        raise ValueError(f"{name} {text!r} is not a path")
    return base / text if text else None


def _format(name: str, text: str, base: Path) -> str:
    if text and text not in FORMATS:
        listed = f"formats are {', '.join(FORMATS)}"
        hint = did_you_mean(text, FORMATS, "did you mean", listed, cutoff=0.4)
        raise ValueError(f"unknown format {text!r} ({hint})")
    return text


def _modality(name: str, text: str, base: Path) -> str:
    if text and text not in MODALITIES:
        raise ValueError(
            f"modality {text!r} is unknown; choose {' or '.join(MODALITIES)} (empty: {RNA})"
        )
    return text or RNA


def _number(name: str, text: str, base: Path) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a number; leave it empty if unknown") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {text}; expected a positive number, or empty if unknown")
    return value


_PARSERS: dict[str, Callable[[str, str, Path], object]] = {
    "slide_id": _plain_name,
    "patient_id": _patient,
    "format": _format,
    "modality": _modality,
    **dict.fromkeys(PATH_COLUMNS, _path),
    **dict.fromkeys(_NUMBERS, _number),
}


def read_manifest(
    path: str | Path, root: str | Path | None = None, *, check_files: bool = True
) -> list[SlideRow]:
    """Read a manifest and check every row.

    Args:
        path: the CSV file.
        root: folder that relative paths start from; None: the folder of the manifest.
        check_files: also require that every file named exists.

    Returns:
        The rows in the order of the file.

    Raises:
        DataError: lists all problems at once, each with its row number.
    """
    rows, problems = scan_manifest(path, root)
    if check_files:
        problems = problems + [p for row in rows for p in missing_files(row)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"manifest {path}: {count}: " + "; ".join(problems))
    return rows


def scan_manifest(
    path: str | Path, root: str | Path | None = None
) -> tuple[list[SlideRow], list[str]]:
    """Read a manifest without stopping at a bad row.

    Args:
        path: the CSV file.
        root: folder that relative paths start from; None: the folder of the manifest.

    Returns:
        The usable rows, and one sentence for each problem (files are not looked for).

    Raises:
        DataError: the file as a whole cannot be read as a table with a usable header.
    """
    path = Path(path)
    header, body = _cells(path)
    _check_header(path, header)
    base = path.parent if root is None else Path(root)
    rows: list[SlideRow] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, cells in body:
        row, found = parse_row(number, header, cells, base)
        problems.extend(found)
        if row is None:
            continue
        if row.slide_id in first_line:
            problems.append(
                f"row {number}: slide_id {row.slide_id!r} was already used in row "
                f"{first_line[row.slide_id]}; ids must be unique"
            )
            continue
        first_line[row.slide_id] = number
        rows.append(row)
    problems += _outcome_problems(rows)
    if not rows and not problems:
        problems.append("no rows below the header; add one row a slide")
    return rows, problems


def _outcome_problems(rows: Sequence[SlideRow]) -> list[str]:
    """One sentence for each patient whose slides do not have the same outcome."""
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        known.setdefault(row.patient_id, {}).setdefault(row.outcome, row.slide_id)
    return [
        f"patient {patient}: the column outcome differs between the slides ("
        + ", ".join(f"{slide}: {value!r}" for value, slide in found.items())
        + "); give one outcome a patient"
        for patient, found in known.items()
        if len(found) > 1
    ]


def missing_files(row: SlideRow) -> list[str]:
    """Return one sentence for each file of ``row`` that does not exist."""
    return [
        f"slide {row.slide_id}: {name} file {value} does not exist; correct the path "
        "(relative paths start at the manifest's folder or at --root)"
        for name in PATH_COLUMNS
        if (value := getattr(row, name)) is not None and not _exists(value)
    ]


def write_manifest(rows: Sequence[SlideRow], path: str | Path) -> None:
    """Write rows as a manifest; paths below its folder become relative, others absolute."""
    path = Path(path)
    base = path.parent.resolve()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell_text(getattr(row, name), base) for name in COLUMNS])
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _cell_text(value: object, base: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, Path):
        full = value.resolve()
        return full.relative_to(base).as_posix() if full.is_relative_to(base) else str(full)
    return repr(value) if isinstance(value, float) else str(value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name the system cannot hold does not exist
        return False


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the non-blank rows, each with its line number in the file."""
    if not path.is_file():
        raise DataError(f"manifest {path} does not exist or is not a file; give the path of a CSV")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, [c.strip() for c in cells]) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"manifest {path} is not a CSV text file ({error}); save it as CSV in UTF-8"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise DataError(f"manifest {path} is empty; expected a header with {', '.join(REQUIRED)}")
    return lines[0][1], lines[1:]


def _check_header(path: Path, header: list[str]) -> None:
    problems = []
    for name in header:
        if name not in COLUMNS:
            listed = f"columns are {', '.join(COLUMNS)}"
            hint = did_you_mean(name, COLUMNS, "did you mean", listed, cutoff=0.5)
            problems.append(f"unknown column {name!r} ({hint})")
    twice = sorted({name for name in header if header.count(name) > 1})
    problems += [f"column {name!r} occurs twice" for name in twice]
    problems += [f"column {name!r} is missing" for name in REQUIRED if name not in header]
    if problems:
        more = "; separate the cells by commas" if ";" in header[0] or "\t" in header[0] else ""
        raise DataError(f"manifest {path}, header: " + "; ".join(problems) + more)
