"""The manifest: one CSV row a slide, naming its files; read, written, and drafted from a folder."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from preprocessing.errors import DataError, did_you_mean
from preprocessing.files import (
    atomic_path,
    plain_name,
    require_folder_part,
    require_plain_name,
    spreadsheet_text,
)
from preprocessing.image_transform import FILES, check_transform
from preprocessing.readers import READERS
from preprocessing.readers.format import Format, detect_format, format_of
from preprocessing.slide_row import COLUMNS, IMAGE_ONLY, PATH_COLUMNS, ROLES, SlideRow, says
from preprocessing.spot_table import MODALITIES, RNA

REQUIRED = ("slide_id", "patient_id", "counts")
_NUMBERS = ("mpp", "image_scale", "pitch_um", "bin_um")
_MAX_DEPTH = 6
_R = "in R, write counts and places as .h5ad (zellkonverter::writeH5AD) or as text tables"
_FOREIGN = {
    (".rds", ".rdata", ".rda"): f"an R object; {_R}",
    (".h5seurat",): f"a Seurat file; {_R}",
    (".zip", ".tar", ".tar.gz", ".tgz", ".7z"): "packed; unpack it and name what is inside",
    (".h5ad.gz", ".h5.gz", ".loom.gz", ".gef.gz"): "packed; unpack it with gunzip",
    (".xlsx", ".xls", ".ods"): "a spreadsheet; save it as CSV (UTF-8)",
    (".h5mu",): "a MuData file; write one modality of it as .h5ad (mdata['rna'].write_h5ad)",
    (".cloupe",): "for Loupe Browser; name the folder that Space Ranger wrote beside it",
}


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
    if text and text not in READERS:
        listed = f"formats are {', '.join(READERS)}"
        hint = did_you_mean(text, READERS, "did you mean", listed, cutoff=0.4)
        raise ValueError(f"unknown format {text!r} ({hint})")
    return text


def _modality(name: str, text: str, base: Path) -> str:
    if text and text not in MODALITIES:
        raise ValueError(
            f"modality {text!r} is unknown; choose {' or '.join(MODALITIES)} (empty: {RNA})"
        )
    return text or RNA


def _role(name: str, text: str, base: Path) -> str:
    if text and text not in ROLES:
        raise ValueError(f"role {text!r} is unknown; choose {' or '.join(ROLES)} (empty: by fold)")
    return text


def _section(name: str, text: str, base: Path) -> str:
    column, equals, value = text.partition("=")
    if text and not (column and equals and value):
        raise ValueError(f"section {text!r} is not COLUMN=VALUE, such as library_id=A1 or suffix=2")
    return text


def _image_transform(name: str, text: str, base: Path) -> str | Path:
    text = text.strip("\"'")
    if not text:
        return ""
    check_transform(text)
    return base / text if Path(text).suffix.lower() in FILES else text


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
    "role": _role,
    "section": _section,
    "image_transform": _image_transform,
    **dict.fromkeys(PATH_COLUMNS, _path),
    **dict.fromkeys(_NUMBERS, _number),
}


def parse_cell(name: str, text: str, base: Path) -> object:
    """What a cell of a column says.

    Args:
        name: of the column.
        text: of the cell; "" where it is empty.
        base: folder that relative paths start from.

    Raises:
        ValueError: the column takes no such text.
    """
    return _PARSERS.get(name, _text)(name, text, base)


def _parse_row(
    number: int, header: list[str], cells: list[str], base: Path
) -> tuple[SlideRow | None, list[str]]:
    """The row of line ``number``, or None where it cannot be used, and its problems."""
    if len(cells) != len(header):
        return None, [f"row {number}: {len(cells)} cells, the header has {len(header)}"]
    values = dict(zip(header, cells, strict=True))
    problems: list[str] = []
    parsed: dict[str, object] = {}
    for name, text in values.items():
        try:
            parsed[name] = parse_cell(name, text, base)
        except ValueError as error:
            problems.append(str(error))
    if not values.get("format"):
        parsed["format"] = _detected(parsed)
        if parsed["format"] is None:
            problems.append(_unknown_format(values, parsed.get("counts")))
    if parsed.get("format"):
        filled = {name for name, text in values.items() if text}
        problems += format_of(str(parsed["format"])).misfits(parsed, filled)
    if problems:
        return None, [f"row {number}: {text}" for text in problems]
    return SlideRow(**parsed), []  # type: ignore[arg-type]


def _detected(parsed: Mapping[str, object]) -> str | None:
    """The format that the files of a row show; None where they show none."""
    paths = (parsed.get(name) for name in ("counts", "image", "spots"))
    return detect_format(*(path if isinstance(path, Path) else None for path in paths))


def _unknown_format(values: Mapping[str, str], counts: object) -> str:
    if not values["counts"]:
        return "it names neither counts nor an image; fill one of them"
    if isinstance(counts, Path) and (foreign := foreign_file(counts)) is not None:
        return f"{values['counts']} is {foreign}"
    return (
        f"the format of {values['counts']} does not show; check the path, or write one of "
        f"{', '.join(READERS)} into the column format"
    )


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
    """Read a manifest, as `read_manifest` does, without stopping at a bad row.

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
        row, found = _parse_row(number, header, cells, base)
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


def foreign_file(path: Path) -> str | None:
    """What a file is that no reader reads, by its name, and what to do; None: it may be read."""
    found = (told for ends, told in _FOREIGN.items() if path.name.lower().endswith(ends))
    there = os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for a name that is too long)
    return next(found, None) if there else None


def missing_files(row: SlideRow) -> list[str]:
    """Return one sentence for each file of ``row`` that is missing, or for other programs."""
    foreign = [
        f"slide {row.slide_id}: {name} file {value} is {told}"
        for name in PATH_COLUMNS
        if name != "image" and isinstance(value := getattr(row, name), Path)
        if (told := foreign_file(value)) is not None
    ]
    return foreign + [
        f"slide {row.slide_id}: {name} file {value} does not exist; correct the path "
        "(relative paths start at the manifest's folder or at --root)"
        for name in (*PATH_COLUMNS, "image_transform")
        if isinstance(value := getattr(row, name), Path) and not _exists(value)
    ]


def write_manifest(rows: Sequence[SlideRow], path: str | Path) -> None:
    """Write rows as a manifest; paths below its folder become relative, others absolute.

    Raises:
        DataError: another file is there: a draft that was corrected by hand, or none of ours.
    """
    path = Path(path)
    base = path.parent.resolve()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell_text(getattr(row, name), base) for name in COLUMNS])
    if path.is_dir() or (path.exists() and path.read_bytes() != text.getvalue().encode()):
        raise DataError(f"{path} is there, with other content; move it, or give another --out")
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _cell_text(value: object, base: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, Path):
        full = value.resolve()
        text = full.relative_to(base).as_posix() if full.is_relative_to(base) else str(full)
        return text if spreadsheet_text(text) == text else f"./{text}"
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


def draft_manifest(folder: str | Path) -> list[SlideRow]:
    """Find slides below a folder, up to six folders deep, and describe them as manifest rows.

    Every format looks for its layouts; whole-slide images that belong to nothing become slides
    without counts (mpp stays empty where the files do not state it: fill it in). The patient is
    what the files say (HEST-1k, sections.csv) or the names of a published layout (HER2ST); where
    nothing does, every slide is a patient of its own (`guessed_patients`): names that begin alike
    say nothing.

    Returns:
        Rows sorted by slide id; ids found twice get their parent folder's name in front.

    Raises:
        DataError: no folder, or none of the layouts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the data")
    formats = [format_of(name) for name in READERS]
    rows = [row for found in _discovered(folder, formats) for row in found]
    used = {row.image for row in rows if row.counts is not None}
    rows = [row for row in rows if row.counts is not None or row.image not in used]
    if not rows:
        layouts = ", ".join(form.layout for form in formats if form.layout)
        raise DataError(
            f"{folder} holds no known layout: looked for {layouts}; write the manifest by hand "
            "(columns: slide_id, patient_id, counts, format, ...)"
        )
    return sorted(_unique_ids(rows), key=lambda row: row.slide_id)


def _discovered(top: Path, formats: list[Format]) -> Iterator[list[SlideRow]]:
    """The rows of every folder; nothing is looked for below one that is a data set as a whole."""
    images = format_of(IMAGE_ONLY)
    for place, below, _ in os.walk(top):
        here = Path(place)
        whole = next((rows for form in formats if form.whole and (rows := form.discover(here))), [])
        others = [form for form in formats if not form.whole and (not whole or form is images)]
        yield whole + [row for form in others for row in form.discover(here)]
        below[:] = sorted(d for d in below if not d.startswith("."))
        if whole or len(here.relative_to(top).parts) >= _MAX_DEPTH:
            below.clear()


def _unique_ids(rows: list[SlideRow]) -> list[SlideRow]:
    ids = [row.slide_id for row in rows]
    named = [
        _renamed(row, plain_name(f"{_study(row)}_{row.slide_id}"))
        if ids.count(row.slide_id) > 1
        else row
        for row in rows
    ]
    twice = {r.slide_id for r in named if [n.slide_id for n in named].count(r.slide_id) > 1}
    if twice:
        raise DataError(
            f"slides with the same name: {', '.join(sorted(twice))}; draft the "
            "manifests of their folders one by one"
        )
    return named


def _renamed(row: SlideRow, slide_id: str) -> SlideRow:
    """The row under another id, which is that of its patient too where nothing names one."""
    own = row.patient_id == row.slide_id
    return replace(row, slide_id=slide_id, patient_id=slide_id if own else row.patient_id)


def _study(row: SlideRow) -> str:
    """Name of the nearest folder above the counts that says more than the layout."""
    place = row.image if row.counts is None else row.counts
    parents = () if place is None else place.resolve().parents
    return next((p.name for p in parents if p.name != row.slide_id and says(p.name)), "")


def guessed_patients(rows: Sequence[SlideRow]) -> list[str]:
    """Ids of drafted slides whose patient no file names: each is taken for one of its own."""
    return [row.slide_id for row in rows if row.patient_id == row.slide_id]
