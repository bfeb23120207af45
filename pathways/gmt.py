"""The GMT format: one gene set a line, ``name<TAB>description<TAB>gene<TAB>gene...``."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import PathwayError
from .textfile import MAX_BYTES, read_text, write_text

FORBIDDEN = "\t\n\r"


@dataclass(frozen=True)
class GeneSet:
    """One gene set, as a line of a GMT file can hold it.

    Attributes:
        name: Non-empty, no tab, line end or surrounding space.
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
        _check_fields(self)
        if len(set(self.genes)) != len(self.genes):
            repeated = sorted({g for g in self.genes if self.genes.count(g) > 1})
            raise PathwayError(
                f"gene set {self.name!r} lists a gene twice: {', '.join(repeated[:5])}. "
                "List every gene once."
            )


def _check_fields(gene_set: GeneSet) -> None:
    """Refuse what a tab-separated line cannot carry without changing it."""
    for field in (gene_set.name, *gene_set.genes):
        if not field or field != field.strip():
            raise PathwayError(
                f"gene set {gene_set.name!r}: {field!r} is empty or has spaces around it; expected "
                "a plain identifier. Strip it."
            )
    for field in (gene_set.name, gene_set.description, *gene_set.genes):
        if any(c in field for c in FORBIDDEN) or field.startswith("\ufeff"):
            raise PathwayError(
                f"gene set {gene_set.name!r}: {field!r} holds a tab, a line end or a byte-order "
                "mark, which GMT cannot store. Remove it."
            )


def read_gmt(path: str | Path, max_bytes: int = MAX_BYTES) -> list[GeneSet]:
    """Read a GMT file (plain or gzip).

    Tolerated: CRLF line ends, trailing tabs, empty fields, blank lines, a byte-order mark. A gene
    written twice in one line counts once (a set has no multiplicity) and a warning says how often
    that happened. Spaces never separate fields: they stay part of names and descriptions.

    Args:
        path: The file.
        max_bytes: Most bytes accepted after decompression.

    Returns:
        The sets in file order.

    Raises:
        PathwayError: A line with fewer than three fields, a name used twice, an empty or damaged
            file. The message names the file and the line (counted from 1).
    """
    first_line: dict[str, int] = {}
    sets: list[GeneSet] = []
    repeats = 0
    for number, line in enumerate(read_text(path, max_bytes).split("\n"), start=1):
        if not line.strip():
            continue
        gene_set, repeated = _parse_line(line, f"{path}, line {number}")
        repeats += repeated
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
    if repeats:
        warnings.warn(
            f"{path}: {repeats} gene(s) written twice in the same set; counted once.", stacklevel=2
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

    Args:
        path: File to write.
        sets: At least one set, names unique.

    Raises:
        PathwayError: No set, or a name used twice.
    """
    sets = list(sets)
    if not sets:
        raise PathwayError(f"{path}: no gene set to write; expected at least one.")
    names = [s.name for s in sets]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise PathwayError(
            f"{path}: gene set names used twice: {', '.join(twice[:5])}. Rename or remove them."
        )
    lines = ("\t".join((s.name, s.description, *s.genes)) for s in sets)
    write_text(path, "\n".join(lines) + "\n")
