"""The manifest: one CSV row a slide, naming its files and what is known about it."""

import csv
import io
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from preprocessing.atomic import atomic_path
from preprocessing.errors import DataError
from preprocessing.manifest_row import (
    COLUMNS,
    FORMATS,
    IMAGE_ONLY,
    PATH_COLUMNS,
    REQUIRED,
    SlideRow,
    parse_row,
)

__all__ = [
    "COLUMNS",
    "FORMATS",
    "IMAGE_ONLY",
    "SlideRow",
    "missing_files",
    "read_manifest",
    "scan_manifest",
    "write_manifest",
]


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
            near = get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"columns are {', '.join(COLUMNS)}"
            problems.append(f"unknown column {name!r} ({hint})")
    twice = sorted({name for name in header if header.count(name) > 1})
    problems += [f"column {name!r} occurs twice" for name in twice]
    problems += [f"column {name!r} is missing" for name in REQUIRED if name not in header]
    if problems:
        more = "; separate the cells by commas" if ";" in header[0] or "\t" in header[0] else ""
        raise DataError(f"manifest {path}, header: " + "; ".join(problems) + more)
