"""Files of gene sets: GMT, read within bounds and written whole."""

import gzip
import os
import secrets
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pathways.errors import PathwayError

MAX_BYTES = 512 * 1024**2  # of a file after decompression
GZIP_MAGIC = b"\x1f\x8b"
FORBIDDEN = "\t\n\r\0"


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    r"""Read a UTF-8 text file, plain or gzip (told by its first bytes), with ``\n`` line ends.

    A byte-order mark is dropped; CRLF and CR become LF. ``max_bytes`` of text are accepted after
    decompression, which protects against gzip bombs.

    Raises:
        PathwayError: No such file, a folder, too large, a damaged gzip, or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise PathwayError(f"{path}: {found}; expected a gene-set file. Check the path.")
    data = _read_bytes(path, max_bytes)
    if len(data) > max_bytes:
        raise PathwayError(
            f"{path}: more than {max_bytes:,} bytes of text (after decompression); no gene-set "
            "file is that large. Check that it is the right file, or split it."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PathwayError(
            f"{path}: byte {error.start} is not UTF-8; expected a text file. "
            "Save it as UTF-8 (for example: iconv -f latin1 -t utf-8)."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """At most ``max_bytes + 1`` bytes, decompressed where the file is gzip."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not zipped:
            return raw.read(max_bytes + 1)
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                return stream.read(max_bytes + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise PathwayError(
                f"{path}: the gzip data are damaged or cut short ({error}). Copy the file again."
            ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically (gzip where the name ends in ``.gz``).

    The bytes go to a temporary name in the same folder, are flushed to disk and then renamed, so a
    reader sees the old file or the new one. Gzip output carries no time stamp: same text, same
    bytes.

    Raises:
        PathwayError: The text holds characters that UTF-8 cannot carry.
        OSError: The folder is missing or not writable.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PathwayError(
            f"{path}: the text holds {text[error.start]!r}, which UTF-8 cannot store; remove it."
        ) from error
    write_bytes(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes atomically: temporary name in the same folder, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class GeneSet:
    """One gene set, as a line of a GMT file can hold it.

    Attributes:
        name: Non-empty, no tab, line end, NUL or surrounding space.
        description: Free text, spaces included; may be empty.
        genes: At least one identifier, each once, in file order.
    """

    name: str
    description: str
    genes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.genes, tuple):
            object.__setattr__(self, "genes", tuple(self.genes))
        if not self.genes:
            raise PathwayError(f"gene set {self.name!r} has no genes; expected at least one.")
        self._check_fields()
        if twice := repeated(self.genes):
            raise PathwayError(
                f"gene set {self.name!r} lists a gene twice: {', '.join(twice[:5])}. "
                "List every gene once."
            )

    def _check_fields(self) -> None:
        """Refuse what a tab-separated line cannot carry without changing it."""
        for field in (self.name, *self.genes):
            if not field or field != field.strip():
                raise PathwayError(
                    f"gene set {self.name!r}: {field!r} is empty or has spaces around it; expected "
                    "a plain identifier. Strip it."
                )
        for field in (self.name, self.description, *self.genes):
            if any(c in field for c in FORBIDDEN) or field.startswith("\ufeff"):
                raise PathwayError(
                    f"gene set {self.name!r}: {field!r} holds a tab, a line end, a NUL or a "
                    "byte-order mark, which GMT or other files cannot store. Remove it."
                )


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, n in Counter(names).items() if n > 1)


def read_gmt(path: str | Path, max_bytes: int = MAX_BYTES) -> list[GeneSet]:
    """Read a GMT file (plain or gzip).

    Tolerated: CRLF line ends, trailing tabs, empty fields, blank lines, a byte-order mark. A gene
    written twice in one line counts once (a set has no multiplicity) and a warning says how often
    that happened. Spaces never separate fields: they stay part of names and descriptions. Sets come
    in file order; ``max_bytes`` as in ``read_text``.

    Raises:
        PathwayError: A line with fewer than three fields, a name used twice, an empty or damaged
            file. The message names the file and the line (counted from 1).
    """
    first_line: dict[str, int] = {}
    sets: list[GeneSet] = []
    n_repeats = 0
    for number, line in enumerate(read_text(path, max_bytes).split("\n"), start=1):
        if not line.strip():
            continue
        gene_set, more = _parse_line(line, f"{path}, line {number}")
        n_repeats += more
        if gene_set.name in first_line:
            raise PathwayError(
                f"{path}: gene set {gene_set.name!r} is on line {first_line[gene_set.name]} and "
                f"again on line {number}; names must be unique. Rename or remove one."
            )
        first_line[gene_set.name] = number
        sets.append(gene_set)
    if not sets:
        raise PathwayError(
            f"{path}: no gene set in it; expected lines of name, description and genes, separated "
            "by tabs."
        )
    if n_repeats:
        warnings.warn(
            f"{path}: {n_repeats} gene(s) written twice in the same set; counted once.",
            stacklevel=2,
        )
    return sets


def _parse_line(line: str, where: str) -> tuple[GeneSet, int]:
    """One line -> (set, number of repeated genes)."""
    if "\t" not in line:
        hint = "GMT is tab-separated; this line has spaces. " if " " in line.strip() else ""
        raise PathwayError(
            f"{where}: one field, expected name, description and genes. {hint}"
            "Separate the fields by tabs."
        )
    fields = line.rstrip("\t").split("\t")
    if len(fields) < 3:
        raise PathwayError(
            f"{where}: {len(fields)} field(s), expected at least 3 (name, description, one gene). "
            "Add the genes or remove the line; the description may be empty but its tab must stay."
        )
    name, description, *rest = fields
    genes = [gene.strip() for gene in rest if gene.strip()]
    try:
        gene_set = GeneSet(name.strip(), description, tuple(dict.fromkeys(genes)))
    except PathwayError as error:
        raise PathwayError(f"{where}: {error}") from error
    return gene_set, len(genes) - len(gene_set.genes)


def write_gmt(path: str | Path, sets: Iterable[GeneSet]) -> None:
    """Write sets as GMT, atomically; gzip where the name ends in ``.gz``.

    ``read_gmt`` returns exactly what was written.

    Raises:
        PathwayError: No set, or a name used twice.
    """
    sets = list(sets)
    if not sets:
        raise PathwayError(f"{path}: no gene set to write; expected at least one.")
    if twice := repeated(s.name for s in sets):
        raise PathwayError(
            f"{path}: gene set names used twice: {', '.join(twice[:5])}. Rename or remove them."
        )
    lines = ("\t".join((s.name, s.description, *s.genes)) for s in sets)
    write_text(path, "\n".join(lines) + "\n")
