"""Files of gene sets: GMT, GMX, lists and JSON, read within bounds; GMT is written whole."""

import codecs
import gzip
import json
import os
import re
import secrets
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat, zip_longest
from pathlib import Path

from pathways.errors import GeneSetWarning, PathwayError

MAX_BYTES = 512 * 1024**2  # of a file after decompression
GZIP_MAGIC = b"\x1f\x8b"
FORBIDDEN = "\t\n\r\0"
_HALF = 16  # bytes that tell whether every other one is 0
_WEIGHTED = re.compile(r"(.+),([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")  # as Enrichr writes
_SYMBOL = re.compile(r"[A-Za-z]+[A-Z0-9][A-Za-z0-9]*([-.][A-Za-z0-9]+)*")
_MOUSE = re.compile(r"[A-Z][a-z0-9]+([-.][A-Za-z0-9]+)*")
_NO_GENE = re.compile(
    r"N/?A|NaN|NONE|NULL|KEGG|REACTOME|GO([A-Z]{2})?|BP|CC|MF|PID|BIOCARTA|HALLMARK|MSIGDB|C[1-8]|H"
    r"|R-[A-Z]{3}-\d+|[a-z]{3}\d{5}|WP\d+|M\d{3,}|TEST|CUSTOM|DESCRIPTION",
    re.IGNORECASE,
)
_MONTH = "(Jan|Feb|Mars?|Mrz|M\xe4rz|Apr|Ma[yi]|Jun|Jul|Aug|Sept?|O[ck]t|Nov|De[cz]|d\xe9c|Dic)"
_DATE = re.compile(
    rf"\d{{1,2}}[-. /]{{1,2}}{_MONTH}\.?([- /]\d{{2,4}})?|{_MONTH}-\d{{1,4}}"
    r"|\d{4}-\d\d-\d\d( 00:00:00)?|\d{1,2}[/.]\d{1,2}[/.](\d{2}|\d{4})",
    re.IGNORECASE,
)
_WORM = re.compile(r"[a-z]+-\d+")  # genes of C. elegans: sep-1
_RESTORE = "restore their names in the source (MARCHF1, SEPTIN2, DELEC1, ...)"
_SERIALS = range(36526, 54789)  # days since 1900 of the years 2000 to 2049
_LISTED = 5


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    r"""Read a text file, plain or gzip (told by its first bytes), with ``\n`` line ends.

    It is UTF-8, or UTF-16 where it begins with the mark of that.

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
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    halves = [data[first:64:2] for first in (0, 1)]
    if not wide and len(data) > _HALF and any(not any(half) for half in halves):
        raise PathwayError(
            f"{path}: it looks like UTF-16 without its mark ('Unicode text' of Windows programs); "
            "save it as UTF-8 (for example: iconv -f utf-16le -t utf-8)."
        )
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PathwayError(
            f"{path}: byte {error.start} is not UTF-{16 if wide else 8}; expected a text file. "
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
        if len(set(self.genes)) < len(self.genes):
            twice = repeated(self.genes)
            raise PathwayError(
                f"gene set {self.name!r} lists a gene twice: {', '.join(twice[:5])}. "
                "List every gene once."
            )

    def _check_fields(self) -> None:
        """Refuse what a tab-separated line cannot carry without changing it."""
        fields = (self.name, self.description, *self.genes)
        names = (self.name, *self.genes)
        if not all(map(isinstance, fields, repeat(str))):
            raise PathwayError(f"gene set {self.name!r} holds {names[1:6]}; expected names as text")
        together = "".join(names)
        blank = together.split() != [together] or "" in names  # seldom: then each is looked at
        for field in names if blank else ():
            if not field or field != field.strip():
                raise PathwayError(
                    f"gene set {self.name!r}: {field!r} is empty or has spaces around it; expected "
                    "a plain identifier. Strip it."
                )
        together = "".join(fields)
        if not any(c in together for c in (*FORBIDDEN, "\ufeff")):
            return
        for field in fields:
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
    _warn_of_repeats(path, n_repeats)
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
    genes = [gene for gene in map(str.strip, rest) if gene]
    try:
        gene_set = GeneSet(name.strip(), description, tuple(dict.fromkeys(genes)))
    except PathwayError as error:
        raise PathwayError(f"{where}: {error}") from error
    return gene_set, len(genes) - len(gene_set.genes)


def read_gmt_leniently(path: str | Path) -> tuple[list[GeneSet], dict[tuple[str, str], float]]:
    """Read a GMT file as it was meant, as `read_gmt` does not; every guess is a warning.

    Quotes around fields are removed. A second field that looks like the genes of its line (or is a
    gene of another) is a gene: the file has no descriptions. ``GENE,1.0`` (Enrichr) is a gene and
    its weight. `odd_names` are named.

    Returns:
        The sets, and weights by (set, gene): empty where the file has none.
    """
    sets = _genes_in_front(path, [_unquoted(one) for one in read_gmt(path)])
    weights: dict[tuple[str, str], float] = {}
    if all(_WEIGHTED.fullmatch(gene) for one in sets for gene in one.genes):
        pairs = [
            (one, [m for gene in one.genes if (m := _WEIGHTED.fullmatch(gene))]) for one in sets
        ]
        weights = {(one.name, m[1]): float(m[2]) for one, found in pairs for m in found}
        sets = [
            GeneSet(one.name, one.description, tuple(dict.fromkeys(m[1] for m in found)))
            for one, found in pairs
        ]
    warn_of_names(path, [gene for one in sets for gene in one.genes])
    return sets, weights


def _unquoted(one: GeneSet) -> GeneSet:
    if '"' not in "".join((one.name, one.description, *one.genes)):
        return one

    def bare(text: str) -> str:
        quoted = len(text) > 2 and text[0] == text[-1] == '"'
        return text[1:-1].strip() if quoted else text

    genes = tuple(dict.fromkeys(map(bare, one.genes)))
    return GeneSet(bare(one.name), bare(one.description), genes)


def _genes_in_front(path: str | Path, sets: list[GeneSet]) -> list[GeneSet]:
    """Put second fields that are genes in front of the genes of their sets.

    A field is one if it is a gene of another set, or if it is written as symbols are and is no
    word or number of a kind (KEGG, WP254) that stands on most lines.
    """
    known = {gene for one in sets for gene in one.genes}
    told = [one.description.strip() for one in sets]
    shaped = [text for text in told if _SYMBOL.fullmatch(text) or _MOUSE.fullmatch(text)]
    kinds = Counter(re.sub(r"\d+", "0", text) for text in shaped)
    common, count = kinds.most_common(1)[0] if kinds else ("", 0)
    column_of_ids = count > 2 and 2 * count > len(sets)
    found: list[GeneSet] = []
    moved = []
    for one, text in zip(sets, told, strict=True):
        looks = _written_as(text, one) and not _NO_GENE.fullmatch(text) and text != one.name
        usual = column_of_ids and re.sub(r"\d+", "0", text) == common
        if text in known or (looks and not usual):
            moved.append(text)
            genes = tuple(dict.fromkeys([text, *one.genes]))
            found.append(GeneSet(one.name, "", genes))
        else:
            found.append(one)
    if moved:
        text = (
            f"{path}: the description of {len(moved)} sets looks like a gene and was read as one "
            f"({', '.join(moved[:5])})"
        )
        fix = "put an empty description in the second column, or longer words"
        warnings.warn(GeneSetWarning(text, fix), stacklevel=4)
    return found


def _written_as(text: str, one: GeneSet) -> bool:
    """Whether a text has the form of most symbols of a set: of mouse or of human genes."""
    if not (_MOUSE.fullmatch(text) or _SYMBOL.fullmatch(text)):
        return False
    mouse = 2 * sum(map(bool, map(_MOUSE.fullmatch, one.genes))) > len(one.genes)
    return bool((_MOUSE if mouse else _SYMBOL).fullmatch(text))


def odd_names(genes: Iterable[str]) -> list[tuple[str, str]]:
    """What is wrong with names of genes of sets or counts, and the fix: dates, numbers, weights.

    Numbers are dates (days since 1900) unless half of the names are: those are Entrez ids.
    """
    names = sorted(set(genes))
    numbers = [name for name in names if name.isdecimal()]
    serials = [name for name in numbers if len(name) < 6 and int(name) in _SERIALS]
    kinds = {
        "are dates": [n for n in names if _DATE.fullmatch(n) and not _WORM.fullmatch(n)],
        "are numbers of days": serials if 2 * len(numbers) < len(names) else [],
    }
    found = [
        (f"{_some(odd, what)}: Excel made them of MARCH1, SEPT2, DEC1, ...", _RESTORE)
        for what, odd in kinds.items()
        if odd
    ]
    if weighted := [name for name in names if _WEIGHTED.fullmatch(name)]:
        told = _some(weighted, "have a number behind a comma and match nothing")
        found.append((told, "take it off, or write a table source, target, weight"))
    return found


def _some(names: list[str], what: str) -> str:
    """How many genes are what, and the first of them."""
    more = ", ..." if len(names) > _LISTED else ""
    return f"{len(names)} genes {what} ({', '.join(names[:_LISTED])}{more})"


def warn_of_names(path: str | Path, genes: Iterable[str]) -> None:
    """Warn of `odd_names`."""
    for told, fix in odd_names(genes):
        warnings.warn(GeneSetWarning(f"{path}: {told}", fix), stacklevel=4)


def _warn_of_repeats(path: str | Path, count: int) -> None:
    if count:
        told = f"{path}: {count} gene(s) written twice in the same set; counted once"
        warnings.warn(GeneSetWarning(told, "write each once"), stacklevel=4)


def read_gmx(path: str | Path) -> list[GeneSet]:
    """Read a GMX file: a column a set, with its name, its description and its genes below."""
    rows = [line.split("\t") for line in read_text(path).split("\n") if line.strip()]
    if len(rows) < 3:
        raise PathwayError(f"{path}: {len(rows)} lines; expected names, descriptions and genes.")
    columns = zip_longest(*rows, fillvalue="")
    return _named_once(path, ((c[0], c[1], c[2:]) for c in columns if any(map(str.strip, c))))


def read_grp(path: str | Path) -> list[GeneSet]:
    """Read a list of genes, one a line (.grp, .txt; lines with # are comments), as one set.

    The set has the name of the file.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    genes = [line.strip('"') for line in lines if line and not line.startswith("#")]
    odd = next((line for line in genes if re.search(r"[\t,;]", line)), None)
    if odd is not None:
        raise PathwayError(
            f"{path}: {odd!r} is no gene; expected a list of genes, one a line. Write genes with "
            "weights as a table source, target, weight (.tsv), and call a GMT file .gmt."
        )
    name = Path(path).name.removesuffix(".gz")
    return _named_once(path, [(name.rpartition(".")[0] or name, "", genes)])


def read_set_json(path: str | Path) -> list[GeneSet]:
    """Read MSigDB's JSON: name -> an object with geneSymbols, or a list of genes."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise PathwayError(f"{path} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise PathwayError(f"{path}: expected an object: name of a set -> its genes.")
    found = []
    for name, value in content.items():
        told = value if isinstance(value, dict) else {"geneSymbols": value}
        genes = told.get("geneSymbols")
        if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
            raise PathwayError(f"{path}: set {name!r} has no list of texts named geneSymbols.")
        found.append((name, str(told.get("systematicName", "")), genes))
    return _named_once(path, found)


def _named_once(path: str | Path, found: Iterable[tuple[str, str, Iterable[str]]]) -> list[GeneSet]:
    """Sets of names, descriptions and genes; a gene written twice in a set counts once."""
    sets, repeats = [], 0
    for name, description, listed in found:
        written = [gene.strip() for gene in listed if gene.strip()]
        genes = dict.fromkeys(written)
        repeats += len(written) - len(genes)
        try:
            sets.append(GeneSet(name.strip(), description.strip(), tuple(genes)))
        except PathwayError as error:
            raise PathwayError(f"{path}: {error}") from error
    if twice := repeated(one.name for one in sets):
        raise PathwayError(f"{path}: gene set names used twice: {', '.join(twice[:5])}.")
    if not sets:
        raise PathwayError(f"{path}: no gene set in it; expected at least one.")
    _warn_of_repeats(path, repeats)
    warn_of_names(path, [gene for one in sets for gene in one.genes])
    return sets


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
