"""The table that says which gene identifiers mean the same gene: data that the user can replace.

A tab-separated text file with a header, gzipped or not, one row a gene (R rows):

=========  ========================================================================
id         Ensembl id or any other id, with or without version; may be empty
symbol     the symbol in use today; may be empty
organism   free text, such as human or mouse; may be empty
aliases    earlier symbols and synonyms, separated by "|" (column may be absent)
ortholog   symbol(s) in the other organism, separated by "|" (column may be absent)
=========  ========================================================================

Rows of the same id, symbol and organism are one gene; their aliases and orthologs are united.
"""

import gzip
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from preprocessing.errors import DataError
from preprocessing.files import atomic_path, file_sha256
from preprocessing.readers.tables import read_table, require_columns

REQUIRED = ("id", "symbol", "organism")
OPTIONAL = ("aliases", "ortholog")
SYMBOL, ID, ORTHOLOG = "symbol", "id", "ortholog"
_NO_HEADER = re.compile(r"ENS[A-Z]*G\d|Gene Expression$")  # what a first line has that is none
CALLED = {  # column -> what tables of Ensembl BioMart, HGNC, MGI, R and Space Ranger call it
    "id": (
        "gene stable id",
        "ensembl gene id",
        "ensgene",
        "gene id",
        "gene ids",
        "ensembl id",
        "ensembl",
    ),
    "symbol": (
        "gene name",
        "external gene name",
        "approved symbol",
        "hgnc symbol",
        "mgi symbol",
        "marker symbol",
        "gene symbol",
    ),
    "organism": ("species",),
    "aliases": (
        "alias symbol",
        "prev symbol",
        "alias symbols",
        "previous symbols",
        "gene synonym",
        "external synonym",
        "synonyms",
    ),
    "ortholog": ("human gene name", "mouse gene name"),
}
FEATURES = ("id", "symbol", "type")  # columns of features.tsv, which has no header
_VERSION = re.compile(r"(ENS[A-Z]*G\d{11})\.\d+(?=$|_PAR_Y$)")


@dataclass(frozen=True)
class Gene:
    """One row of a gene table."""

    id: str
    symbol: str
    organism: str = ""
    aliases: frozenset[str] = frozenset()
    orthologs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GeneTable:
    """Genes with their identifiers.

    Attributes:
        genes: the rows; no two have the same id, symbol and organism.
        name: what messages call the table, such as its file.
        sha256: of the file; "" of a table made in memory.
    """

    genes: tuple[Gene, ...]
    name: str = "gene table"
    sha256: str = ""

    def __post_init__(self) -> None:
        """Refuse a table without genes, or whose ids are the symbols of other genes."""
        if not self.genes:
            raise DataError(f"{self.name} has no gene; expected one a row")
        symbol_of = {gene.id: gene.symbol for gene in self.genes if gene.id}
        for gene in self.genes:
            if symbol_of.get(gene.symbol, gene.symbol) != gene.symbol:
                raise DataError(
                    f"{self.name}: {gene.symbol!r} is the symbol of one gene and the id of another "
                    f"({symbol_of[gene.symbol]!r}); correct one of the two rows"
                )

    @property
    def organisms(self) -> tuple[str, ...]:
        """The organisms named, sorted, without the empty one."""
        return tuple(sorted({gene.organism for gene in self.genes} - {""}))

    def of(self, organism: str) -> tuple[Gene, ...]:
        """Return the genes of one organism, upper and lower case alike; () where it has none."""
        wanted = organism.strip().casefold()
        return tuple(g for g in self.genes if wanted and g.organism.casefold() == wanted)

    def targets(self, gene: Gene, target: str) -> frozenset[str]:
        """Return what a gene may be called under a target (see `check_target`): 0, 1 or more."""
        if target == ID:
            return _filled([without_version(gene.id)])
        own = target == SYMBOL or (target != ORTHOLOG and gene.organism == target)
        return _filled([gene.symbol]) if own else gene.orthologs

    def check_target(self, target: str) -> None:
        """Check that the table can give the identifiers wanted.

        Args:
            target: "symbol", "id" (without version), "ortholog", or an organism of the table: its
                own symbols, and the orthologs of the other organism's genes.

        Raises:
            DataError: unknown target, or an organism in a table of more than two.
        """
        if target in (SYMBOL, ID, ORTHOLOG):
            return
        choices = ", ".join((SYMBOL, ID, ORTHOLOG, *self.organisms))
        if target not in self.organisms:
            raise DataError(f"{self.name}: target {target!r} is unknown; choose one of: {choices}")
        if len(self.organisms) > 2 or any(not gene.organism for gene in self.genes):
            raise DataError(
                f"{self.name} holds {len(self.organisms)} organisms ({', '.join(self.organisms)}) "
                f"and target {target!r} needs exactly two, with every row filled: in a larger "
                "table the column ortholog does not say whose symbols it holds. Give a table of "
                f"{target} and the slides' organism only, or the target {ORTHOLOG!r}"
            )


def read_gene_table(path: str | Path) -> GeneTable:
    """Read a gene table (the module's text says how it looks).

    Raises:
        DataError: no such file, no table, a column is missing or unknown, or a row names no gene.
    """
    path = Path(path)
    frame = read_table(path)
    require_columns(frame, REQUIRED, path)
    unknown = [name for name in frame.columns if name not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise DataError(
            f"{path}: unknown column {unknown[0]!r}; a gene table has {', '.join(REQUIRED)} and "
            f"may have {', '.join(OPTIONAL)}: rename or remove the others"
        )
    columns = [
        frame[name].str.strip().tolist() if name in frame.columns else [""] * len(frame)
        for name in (*REQUIRED, *OPTIONAL)
    ]
    united: dict[tuple[str, str, str], tuple[set[str], set[str]]] = {}
    for number, (key, symbol, organism, aliases, orthologs) in enumerate(
        zip(*columns, strict=True), start=2
    ):
        if not (key or symbol):
            raise DataError(f"{path}: line {number} has neither id nor symbol; remove it")
        sets = united.setdefault((key, symbol, organism), (set(), set()))
        sets[0].update(_several(aliases))
        sets[1].update(_several(orthologs))
    genes = tuple(
        Gene(key, symbol, organism, frozenset(aliases), frozenset(orthologs))
        for (key, symbol, organism), (aliases, orthologs) in united.items()
    )
    return GeneTable(genes, str(path), file_sha256(path))


def draft_gene_table(
    source: Path, out: Path, organism: str = "", orthologs: Path | None = None
) -> GeneTable:
    """Write a gene table from one that others made, and read it.

    Args:
        source: a table whose columns are called as in `CALLED` (any case; ``_`` for a space), or a
            ``features.tsv`` of Space Ranger; gzipped or not. Rows without id and symbol are left
            out, columns of other names are not read.
        out: the gene table, gzipped where its name ends in .gz.
        organism: of all rows; "" where a column says it.
        orthologs: table of two columns: symbols of the two organisms that belong together, in any
            order; a gene may stand in several rows.

    Raises:
        DataError: a table cannot be read, has no id or symbol, or no ortholog has a symbol of it.
    """
    frame = read_table(source)
    if any(_NO_HEADER.match(name) for name in frame.columns):
        more = (f"column {n}" for n in range(frame.shape[1]))
        frame = read_table(source, [*FEATURES, *more][: frame.shape[1]])
    table = _recognised(frame)
    if not (table["id"] != "").any() and not (table["symbol"] != "").any():
        names = ", ".join(("id", *CALLED["id"], "symbol", *CALLED["symbol"]))
        raise DataError(
            f"{source} has the columns {', '.join(frame.columns[:8])} and none of ids or symbols "
            f"(expected one called {names}); rename it"
        )
    if organism:
        table["organism"] = organism
    if orthologs is not None:
        table["ortholog"] = _orthologs(orthologs, table["symbol"])
    table = table[(table["id"] != "") | (table["symbol"] != "")].drop_duplicates()
    with atomic_path(out) as temporary:
        text = table.to_csv(sep="\t", index=False).encode()
        temporary.write_bytes(gzip.compress(text) if out.suffix == ".gz" else text)
    return read_gene_table(out)


def _recognised(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of a gene table, "" where the source has none; aliases of several are joined."""
    table = pd.DataFrame("", index=frame.index, columns=[*REQUIRED, *OPTIONAL])
    for column in frame.columns:
        plain = column.casefold().replace("_", " ")
        for ours in (name for name, known in CALLED.items() if plain in (name, *known)):
            texts = frame[column].str.strip()
            if ours in OPTIONAL:
                texts = table[ours] + "|" + texts.str.replace(r"[,;]\s*", "|", regex=True)
                table[ours] = texts.str.strip("|")
            else:
                table[ours] = table[ours].where(table[ours] != "", texts)
    return table


def _orthologs(path: Path, symbols: "pd.Series[str]") -> list[str]:
    """The symbols of the other organism for every symbol, joined by "|"."""
    frame = read_table(path)
    if frame.shape[1] != len(("own", "other")):
        raise DataError(f"{path} has {frame.shape[1]} columns; expected two, symbols of organisms")
    known = set(symbols) - {""}
    own = frame.isin(known).sum().to_numpy().argmax()
    found: dict[str, set[str]] = {}
    pairs = [tuple(row) for row in frame.to_numpy()]
    if known & set(frame.columns):  # no header
        pairs.append(tuple(frame.columns))
    for pair in pairs:
        if pair[own]:
            found.setdefault(pair[own], set()).update({pair[1 - own]} - {"", "NA"})
    if not known & set(found):
        raise DataError(f"{path}: none of its symbols is one of the table; give that organism's")
    return ["|".join(sorted(found.get(symbol, ()))) for symbol in symbols]


def without_version(name: str) -> str:
    """Remove the version of an Ensembl gene id; leave everything else as it is.

    ``_PAR_Y``, which GENCODE writes behind the copies on the Y chromosome, stays.
    """
    return _VERSION.sub(r"\1", name)


def _several(cell: str) -> frozenset[str]:
    return _filled(part.strip() for part in cell.split("|"))


def _filled(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(text for text in texts if text)
