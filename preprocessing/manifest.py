"""The manifest: one CSV row a slide, naming its files and what is known about it."""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from preprocessing.atomic import atomic_path
from preprocessing.errors import DataError

IMAGE_ONLY = "image"  # a slide without counts
FORMATS = ("visium", "legacy_st", IMAGE_ONLY)
REQUIRED = ("slide_id", "patient_id", "counts", "format")
_PATHS = ("counts", "image", "spots", "labels")
_NUMBERS = ("mpp", "image_scale", "pitch_um")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class SlideRow:
    """One slide of a manifest; the columns of the CSV carry the same names.

    Attributes:
        slide_id: plain name [A-Za-z0-9._-]; names the store file.
        patient_id: splits are made by patient.
        counts: Space Ranger folder or matrix (visium), counts table (legacy_st); None (image).
        format: "visium", "legacy_st", or "image" for a slide without counts: its spots are a
            square grid of windows over the tissue.
        image: slide image (image: required); None gives a counts-only store.
        spots: spot table (legacy_st: required; visium: instead of spatial/tissue_positions*).
        labels: table with labels or measurements per spot.
        mpp: um per level-0 pixel of the image file named (of the coordinates without image).
        image_scale: image pixels per coordinate pixel; None: 1, or for Space Ranger by the names
            tissue_hires_image / tissue_lowres_image.
        pitch_um: centre-to-centre distance in um of one array step (legacy ST: 200 or 100), or of
            the grid (image; None: as wide as a patch).
        tissue: free text.
        organism: free text, such as "human".
        technology: free text, such as "Visium".
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

    @property
    def counts_path(self) -> Path:
        """The counts, for the readers of formats that have some; DataError where there are none."""
        if self.counts is None:
            raise DataError(f"format {self.format} needs the column 'counts'; it is empty")
        return self.counts


COLUMNS = tuple(f.name for f in fields(SlideRow))


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
    if not rows and not problems:
        problems.append("no rows below the header; add one row a slide")
    return rows, problems


def missing_files(row: SlideRow) -> list[str]:
    """Return one sentence for each file of ``row`` that does not exist."""
    return [
        f"slide {row.slide_id}: {name} file {value} does not exist; correct the path "
        "(relative paths start at the manifest's folder or at --root)"
        for name in _PATHS
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


def _parse_row(
    number: int, header: list[str], cells: list[str], base: Path
) -> tuple[SlideRow | None, list[str]]:
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
    problems += [f"row {number}: {text}" for text in _misfits(parsed, values)]
    if problems:
        return None, problems
    return SlideRow(**parsed), []  # type: ignore[arg-type]


def _misfits(parsed: Mapping[str, object], values: Mapping[str, str]) -> list[str]:
    """What the format asks of the other columns, and they do not give."""
    if parsed.get("format") == IMAGE_ONLY:
        problems = [
            f"format image lays its own grid; leave the column {name!r} empty"
            for name in ("counts", "spots", "image_scale")
            if values.get(name)
        ]
        if not values.get("image"):
            problems.append("format image needs the column 'image' (slide image)")
        return problems
    problems = []
    if "format" in parsed and not values["counts"]:
        problems.append("counts is empty; a slide without counts has the format 'image'")
    if parsed.get("format") == "legacy_st" and not values.get("spots"):
        problems.append("format legacy_st needs the column 'spots' (spot table)")
    return problems


def _text(name: str, text: str, base: Path) -> str:
    return text


def _plain_name(name: str, text: str, base: Path) -> str:
    if not _PLAIN_NAME.fullmatch(text):
        raise ValueError(
            f"{name} {text!r} is not a plain name; use letters, digits, '.', '_', '-' only "
            "(at most 128, not beginning with '.' or '-')"
        )
    return text


def _filled(name: str, text: str, base: Path) -> str:
    if not text:
        raise ValueError(f"{name} is empty; every slide needs one")
    return text


def _path(name: str, text: str, base: Path) -> Path | None:
    if "\0" in text:
        raise ValueError(f"{name} {text!r} is not a path")
    return base / text if text else None


def _format(name: str, text: str, base: Path) -> str:
    if text not in FORMATS:
        near = get_close_matches(text, FORMATS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"formats are {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {text!r} ({hint})")
    return text


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
    "patient_id": _filled,
    "format": _format,
    **dict.fromkeys(_PATHS, _path),
    **dict.fromkeys(_NUMBERS, _number),
}
