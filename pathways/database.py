"""`PathwayDatabase`: gene sets as one long table, also read from a file (docs/method.md 2).

Shapes: G genes of a panel, M pathways.
"""

import csv
import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.sparse import csr_matrix

from pathways.coverage import CoverageReport, check_coverage, count_coverage, detect_id_type
from pathways.errors import GeneSetWarning, PathwayError
from pathways.files import GeneSet, read_text, repeated, warn_of_names

COLUMNS = ["source", "target", "weight"]
ALIKE = (  # what other programs call the first two
    ("gs_name", "gene_symbol"),
    ("term", "gene"),
    ("ont", "gene"),
    ("pathway", "gene"),
    ("gene_set", "gene"),
    ("geneset", "genesymbol"),
)
SEPARATORS = {".tsv": "\t", ".csv": ","}
TABLE_SUFFIXES = tuple(s + z for s in SEPARATORS for z in ("", ".gz"))


@dataclass(frozen=True)
class OverlapReport:
    """How much the sets share (Jaccard index of every pair).

    Attributes:
        max: Largest Jaccard index, 0-1.
        mean: Mean over all pairs, 0-1.
        top: The most overlapping pairs, (name, name, Jaccard), falling.
    """

    max: float
    mean: float
    top: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, eq=False)
class PathwayDatabase:
    """Gene sets with weights: the long table ``source, target, weight``.

    Attributes:
        name: Short name, for reports.
        table: One row a (pathway, gene): source (pathway name), target (gene), weight (finite, not
            0; 1 for plain sets; signed weights allowed). Treat as read-only.
        organism: "human", "mouse", or "" where not stated.
        id_type: Kind of gene identifier, see ``detect_id_type``; detected where not given.
        licence: Licence of the content, "" where not stated.
        version: Version of the content.
        descriptions: Pathway name -> one line of meaning; may be incomplete.
    """

    name: str
    table: pd.DataFrame
    organism: str = ""
    id_type: str = ""
    licence: str = ""
    version: str = ""
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = _checked_table(self.name, self.table)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "descriptions", dict(self.descriptions))
        if not self.id_type:
            object.__setattr__(self, "id_type", detect_id_type(table["target"].unique()))

    @classmethod
    def from_sets(
        cls,
        sets: Iterable[GeneSet],
        name: str,
        organism: str = "",
        id_type: str = "",
        licence: str = "",
        version: str = "",
        weights: Mapping[tuple[str, str], float] | None = None,
    ) -> "PathwayDatabase":
        """Build from gene sets; ``weights`` by (set, gene), else every weight 1; unique names."""
        sets = list(sets)
        names = [s.name for s in sets]
        if twice := repeated(names):
            raise PathwayError(f"{name}: gene set names used twice: {', '.join(twice[:5])}.")
        sizes = [len(s.genes) for s in sets]
        table = pd.DataFrame(
            {
                "source": np.repeat(np.array(names, dtype=object), sizes),
                "target": np.array([g for s in sets for g in s.genes], dtype=object),
                "weight": [weights.get((s.name, g), 1.0) for s in sets for g in s.genes]
                if weights
                else 1.0,
            }
        )
        descriptions = {s.name: s.description for s in sets}
        return cls(name, table, organism, id_type, licence, version, descriptions)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical table: sorted lines ``source<TAB>target<TAB>weight``."""
        source, target, weight = (self.table[c].tolist() for c in COLUMNS)
        text = {w: f"{w!r}" for w in set(weight)}
        rows = zip(source, target, weight, strict=True)
        lines = sorted(f"{s}\t{t}\t{text[w]}" for s, t, w in rows)
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Pathway names (M,), in order of first appearance: the column order of ``matrix``."""
        return tuple(self.table["source"].unique())

    @property
    def genes(self) -> tuple[str, ...]:
        """Every gene once, in order of first appearance."""
        return tuple(self.table["target"].unique())

    def genes_of(self, name: str) -> tuple[str, ...]:
        """Genes of one pathway, in table order.

        Raises:
            PathwayError: Unknown name; the message gives the nearest ones.
        """
        rows = self.table["source"] == name
        if not rows.any():
            near = get_close_matches(name, self.names, n=3) or list(self.names[:3])
            raise PathwayError(
                f"{self.name} has no pathway {name!r}; the nearest of its {len(self.names):,} "
                f"names: {', '.join(near)}."
            )
        return tuple(self.table.loc[rows, "target"])

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """Genes of every pathway, in table order; pathways in the order of ``names``."""
        code, names = pd.factorize(self.table["source"])
        genes = self.table["target"].to_numpy()[np.argsort(code, kind="stable")]
        own = np.split(genes, np.cumsum(np.bincount(code))[:-1])
        return {str(name): tuple(one) for name, one in zip(names, own, strict=True)}

    def plain_sets(self) -> list[GeneSet]:
        """The sets for parsers that split a line of GMT at every blank, as decoupler's does.

        Blanks in names and descriptions become "_", a description that is missing "na".

        Raises:
            PathwayError: Weights, or genes with blanks, which such a file cannot hold.
        """
        if (self.table["weight"] != 1).any():
            raise PathwayError(
                f"{self.name} has weights, which GMT cannot hold. decoupler takes its table as it "
                "is: pathways.load_pathways(NAME).table."
            )
        if odd := [gene for gene in self.genes if len(gene.split()) > 1]:
            raise PathwayError(f"{self.name} has genes with blanks: {', '.join(odd[:5])}.")
        told = {name: "_".join(self.descriptions.get(name, "").split()) for name in self.names}
        return [
            GeneSet("_".join(name.split()), told[name] or "na", genes)
            for name, genes in self.members.items()
        ]

    def restrict(
        self, genes: Sequence[str], min_genes: int = 5, max_genes: int = 500
    ) -> tuple["PathwayDatabase", CoverageReport]:
        """Keep genes of a panel, and the sets that then have a sensible size.

        Args:
            genes: Identifiers of the panel (G,), unique.
            min_genes: Fewest panel genes of a set that is kept.
            max_genes: Most panel genes of a set that is kept.

        Returns:
            The smaller database, and what was kept and dropped.

        Raises:
            PathwayError: Almost nothing matches (with a diagnosis), or no set is left.
        """
        if not 1 <= min_genes <= max_genes:
            raise PathwayError(
                f"min_genes={min_genes}, max_genes={max_genes}; expected 1 <= min_genes <= "
                "max_genes."
            )
        panel = gene_index(genes)
        report = count_coverage(self.name, self.table, panel, min_genes, max_genes)
        check_coverage(report, self.genes, panel, (min_genes, max_genes))
        kept = report.table.loc[report.table["status"] == "kept", "set"]
        rows = self.table["source"].isin(kept) & self.table["target"].isin(panel)
        descriptions = {n: self.descriptions[n] for n in kept if n in self.descriptions}
        table = self.table[rows]
        return replace(self, table=table, descriptions=descriptions), report

    def matrix(self, genes: Sequence[str]) -> csr_matrix:
        """Weights as genes x pathways.

        Args:
            genes: Identifiers of the panel (G,), unique; set genes outside it are left out (use
                ``restrict`` to see how many).

        Returns:
            CSR float32 (G, M); columns in the order of ``names``.
        """
        row = gene_index(genes).get_indexer(pd.Index(self.table["target"]))
        column = pd.factorize(self.table["source"])[0]
        inside = row >= 0
        weight = self.table["weight"].to_numpy(dtype=np.float32)[inside]
        shape = (len(genes), len(self.names))
        return csr_matrix((weight, (row[inside], column[inside])), shape=shape)

    def overlap(self, n_top: int = 10) -> OverlapReport:
        """Jaccard overlap of the sets (weights ignored), with the ``n_top`` most alike pairs."""
        member = self.matrix(self.genes)
        member.data = np.ones_like(member.data)
        size = np.asarray(member.sum(axis=0)).ravel()
        shared = sparse.triu(member.T @ member, k=1).tocoo()
        jaccard = shared.data / (size[shared.row] + size[shared.col] - shared.data)
        n_pairs = len(size) * (len(size) - 1) // 2
        order = np.lexsort((shared.col, shared.row, -jaccard))[:n_top]
        names = self.names
        top = tuple((names[shared.row[i]], names[shared.col[i]], float(jaccard[i])) for i in order)
        largest = top[0][2] if top else 0.0
        return OverlapReport(largest, float(jaccard.sum() / n_pairs) if n_pairs else 0.0, top)


def gene_index(genes: Sequence[str]) -> "pd.Index[str]":
    """Panel genes as an index.

    Raises:
        PathwayError: The panel is empty or names a gene twice.
    """
    index: pd.Index[str] = pd.Index(np.asarray(genes, dtype=object))
    if len(index) == 0:
        raise PathwayError("the panel has no genes; expected at least one gene name.")
    if not index.is_unique:
        twice = index[index.duplicated()].unique()
        raise PathwayError(
            f"the panel names {len(twice)} gene(s) twice: {', '.join(map(str, twice[:5]))}. "
            "Make gene names unique first."
        )
    return index


def _checked_table(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A copy with the three columns, checked."""
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise PathwayError(
            f"{name}: column(s) {', '.join(missing)} missing, found "
            f"{', '.join(map(str, table.columns))}; expected {', '.join(COLUMNS)}. Rename them."
        )
    if table.empty:
        raise PathwayError(f"{name}: the table has no rows; expected at least one gene set.")
    table = table[COLUMNS].reset_index(drop=True).copy()
    codes = {}
    for column in ("source", "target"):
        table[column] = names = table[column].astype(object)
        if pd.api.types.infer_dtype(names, skipna=False) != "string":
            names = names.map(lambda v: v if isinstance(v, str) else "")
        codes[column], different = pd.factorize(names)
        wrong = np.array([v == "" or v != v.strip() for v in different])[codes[column]]
        _refuse_rows(name, table, wrong, f"an empty or padded {column}; expected a plain name")
    table["weight"] = pd.to_numeric(table["weight"], errors="coerce").astype(np.float64)
    wrong = ~np.isfinite(table["weight"]) | (table["weight"] == 0)
    _refuse_rows(name, table, wrong, "a weight that is not a finite number other than 0")
    twice = pd.DataFrame(codes).duplicated()
    _refuse_rows(name, table, twice, "a pathway-gene pair that an earlier row has")
    return table


def _refuse_rows(name: str, table: pd.DataFrame, wrong: npt.ArrayLike, what: str) -> None:
    """Raise for marked rows, naming how many, and the first."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        first = int(rows[0])
        values = ", ".join(f"{c}={table[c].tolist()[first]!r}" for c in COLUMNS)
        raise PathwayError(
            f"{name}: {len(rows)} row(s) with {what}; the first is table row {first + 1} "
            f"({values}). Correct or remove them."
        )


def read_table(path: str | Path) -> PathwayDatabase:
    """Read a long table: .tsv, .csv, .tsv.gz or .csv.gz; the database is named after the file.

    Columns ``source`` (pathway) and ``target`` (gene) are required, ``weight`` is optional (1);
    ``gs_name, gene_symbol`` (msigdbr) and ``term, gene`` (clusterProfiler) stand for the first two,
    and a pair that they repeat counts once, with a warning. Other columns are not read. Nothing is
    taken for a missing value, so a gene called NA stays one.

    Raises:
        PathwayError: A column is missing, or a row is wrong (file and line are named).
    """
    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    rows, named_alike = _renamed(_read_rows(path, SEPARATORS[suffix]))
    header, body = rows[0][1], rows[1:]
    missing = [c for c in COLUMNS[:2] if c not in header]
    if missing:
        raise PathwayError(
            f"{path}, line 1: column(s) {', '.join(missing)} missing, found {', '.join(header)}; "
            "expected source, target and optionally weight (or gs_name, gene_symbol; term, gene). "
            "Rename the header."
        )
    if not body:
        raise PathwayError(f"{path}: a header and no rows; expected one row a pathway and gene.")
    column = {name: header.index(name) for name in COLUMNS if name in header}
    table = pd.DataFrame(
        {
            "source": [fields[column["source"]].strip() for _, fields in body],
            "target": [fields[column["target"]].strip() for _, fields in body],
            "weight": _weights(path, body, column.get("weight")),
        }
    )
    numbers = [number for number, _ in body]
    twice = table.duplicated(COLUMNS)
    if named_alike and twice.any():
        told = f"{path}: {int(twice.sum())} pairs of set and gene written twice; counted once"
        warnings.warn(GeneSetWarning(told, "write each once"), stacklevel=2)
        numbers = [n for n, again in zip(numbers, twice, strict=True) if not again]
        table = table[~twice].reset_index(drop=True)
    _check_rows(path, table, numbers)
    warn_of_names(path, table["target"])
    return PathwayDatabase(name=path.name, table=table)


def _renamed(rows: list[tuple[int, list[str]]]) -> tuple[list[tuple[int, list[str]]], bool]:
    """The rows with our names in the header, and whether it had those of other programs."""
    number, header = rows[0][0], [name.strip() for name in rows[0][1]]
    pair = next((pair for pair in ALIKE if set(pair) <= set(header)), None)
    if pair is None or {"source", "target"} & set(header):
        return [(number, header), *rows[1:]], False
    ours = dict(zip(pair, COLUMNS, strict=False))
    return [(number, [ours.get(name, name) for name in header]), *rows[1:]], True


def _read_rows(path: Path, separator: str) -> list[tuple[int, list[str]]]:
    """Non-blank rows with their line numbers, all as long as the header.

    A first line without ``separator`` says another: semicolons, as spreadsheets write, or tabs.
    """
    text = read_text(path)
    first = text.split("\n", 1)[0]
    if separator not in first:
        separator = max((separator, *";\t,"), key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    try:
        rows = [(reader.line_num, fields) for fields in reader if any(f.strip() for f in fields)]
    except csv.Error as error:
        raise PathwayError(
            f"{path}, line {reader.line_num}: {error}. Correct the quoting."
        ) from error
    if not rows:
        raise PathwayError(f"{path}: empty; expected a header source, target, weight and rows.")
    width = len(rows[0][1])
    for number, fields in rows:
        if len(fields) != width:
            raise PathwayError(
                f"{path}, line {number}: {len(fields)} fields, the header has {width}. Correct "
                "the row, or check that the file name says the right separator (.tsv, .csv)."
            )
    return rows


def _weights(path: Path, body: list[tuple[int, list[str]]], column: int | None) -> list[float]:
    if column is None:
        return [1.0] * len(body)
    weights = []
    for number, fields in body:
        try:
            weight = float(fields[column])
        except ValueError:
            weight = float("nan")
        if not np.isfinite(weight) or weight == 0:
            raise PathwayError(
                f"{path}, line {number}: weight {fields[column]!r}; expected a finite number other "
                "than 0. Correct it, or remove the row (a weight of 0 is no member)."
            )
        weights.append(weight)
    return weights


def _check_rows(path: Path, table: pd.DataFrame, numbers: list[int]) -> None:
    """Refuse empty names and repeated pairs, naming the line."""
    empty = (table["source"] == "") | (table["target"] == "")
    if empty.any():
        line = numbers[int(np.flatnonzero(empty)[0])]
        raise PathwayError(f"{path}, line {line}: an empty source or target. Fill it or remove it.")
    twice = table.duplicated(["source", "target"])
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        source, target = table["source"].iloc[row], table["target"].iloc[row]
        same = (table["source"] == source) & (table["target"] == target)
        first = numbers[int(np.flatnonzero(same)[0])]
        raise PathwayError(
            f"{path}: {target} in {source} is on line {first} and again on line {numbers[row]}; "
            "a gene has one weight in a set. Remove one."
        )
