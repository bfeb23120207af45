"""Gene identifiers -> the ones wanted: kept, renamed, merged and lost, each counted.

A gene is looked up by id (with, then without version), then by symbol, then by alias; at each step
the id of the source comes before its name. Upper and lower case are told apart. Nothing is guessed:
a gene that could be called two things (an alias of two genes, several orthologs) is left out and
counted. Genes with the same target are one gene: their counts are summed.

Shapes: S spots, G genes before, H genes after.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from preprocessing.errors import DataError
from preprocessing.files import file_sha256
from preprocessing.gene_ids.table import (
    ID,
    ORTHOLOG,
    SYMBOL,
    Gene,
    GeneTable,
    read_gene_table,
    without_version,
)
from preprocessing.spot_table import (
    PROTEIN,
    SOURCE_COLUMNS,
    SpotTable,
    integer_counts,
    intensities,
)

UNKNOWN = "not in the table"
NO_TARGET = "no such identifier"
AMBIGUOUS = "ambiguous"
SEVERAL = "several orthologs"
REASONS = (UNKNOWN, NO_TARGET, AMBIGUOUS, SEVERAL)
_SHOWN = 5
_PIECE = 4_000_000  # stored counts that are summed at once


@dataclass(frozen=True)
class Found:
    """Where a gene goes: its target, or the reason why it is lost."""

    target: str = ""
    reason: str = ""


@dataclass(frozen=True)
class GeneMapReport:
    """What became of each gene: n_in = kept + renamed + lost. Names are sorted.

    Attributes:
        target: the identifiers wanted.
        n_in: G, genes before.
        n_out: H, genes after.
        kept: names that were as wanted.
        renamed: (before, after).
        merged: (after, names before), for every gene made of two or more.
        lost: (reason, names); the reasons are `REASONS`.
        lost_share: share of all counts that lies in the lost genes, 0..1.
        sources: (after, ids before, names before), several joined by "|", for every gene.
    """

    target: str
    n_in: int
    n_out: int
    kept: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    merged: tuple[tuple[str, tuple[str, ...]], ...]
    lost: tuple[tuple[str, tuple[str, ...]], ...]
    lost_share: float
    sources: tuple[tuple[str, str, str], ...]

    @property
    def n_lost(self) -> int:
        """Number of genes left out, for any reason."""
        return sum(len(names) for _, names in self.lost)

    def lines(self) -> tuple[str, ...]:
        """Return the report as sentences, the first names with each count."""
        lines = [f"genes mapped to {self.target}: {self.n_in} before, {self.n_out} after"]
        lines.append(_counted("kept", self.kept))
        lines.append(_counted("renamed", [f"{old} -> {new}" for old, new in self.renamed]))
        groups = [f"{' + '.join(old)} -> {new}" for new, old in self.merged]
        lines.append(_counted("summed from several", groups))
        lines += [_counted(f"lost, {reason}", names) for reason, names in self.lost]
        if self.n_lost:
            lines.append(f"genes lost hold {self.lost_share:.2%} of the counts")
        return tuple(line for line in lines if line)

    def __str__(self) -> str:
        """Return the sentences, one a line."""
        return "\n".join(self.lines())


def _report(
    target: str,
    keys: list[str],
    before: list[str],
    found: list[Found],
    order: list[str],
    lost_share: float,
) -> GeneMapReport:
    """Sort genes (G,) into kept, renamed, merged and lost; ``order`` are the new names."""
    groups: dict[str, list[str]] = {name: [] for name in order}
    ids: dict[str, list[str]] = {name: [] for name in order}
    lost: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for key, name, one in zip(keys, before, found, strict=True):
        (groups[one.target] if one.target else lost[one.reason]).append(name)
        if one.target:
            ids[one.target].append(key)
    pairs = [(old, new) for new, names in groups.items() for old in names]
    merged = [(new, tuple(sorted(old))) for new, old in groups.items() if len(old) > 1]
    return GeneMapReport(
        target=target,
        n_in=len(before),
        n_out=len(order),
        kept=tuple(sorted(old for old, new in pairs if old == new)),
        renamed=tuple(sorted((old, new) for old, new in pairs if old != new)),
        merged=tuple(sorted(merged)),
        lost=tuple((reason, tuple(sorted(lost[reason]))) for reason in REASONS if lost[reason]),
        lost_share=lost_share,
        sources=tuple(sorted((name, _joined(ids[name]), _joined(groups[name])) for name in order)),
    )


def _joined(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))


def _counted(what: str, names: Sequence[str]) -> str:
    """Return "genes WHAT: N (first names)", or "" for none."""
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"genes {what}: {len(names)} ({', '.join(names[:_SHOWN])}{more})"


@dataclass(frozen=True)
class GeneMapConfig:
    """What `hibio prepare` needs to map genes.

    Attributes:
        table: gene table, see `preprocessing.gene_ids.table`.
        target: "symbol", "id", "ortholog", or an organism of the table.
    """

    table: Path
    target: str = SYMBOL

    def settings(self) -> dict[str, Any]:
        """What the genes of a store depend on, "sources" among it: older stores lack them."""
        kept = {"sha256": file_sha256(self.table), "target": self.target}
        return {**kept, "sources": list(SOURCE_COLUMNS)}


def map_genes(
    names: Sequence[str] | np.ndarray,
    ids: Sequence[str] | np.ndarray,
    counts: csr_matrix,
    table: GeneTable,
    target: str = SYMBOL,
    organism: str = "",
) -> tuple[np.ndarray, np.ndarray, csr_matrix, GeneMapReport]:
    """Give genes the identifiers wanted.

    Mapping a result again changes nothing, except that with orthologs a text that means different
    genes in the two organisms is ambiguous then.

    Args:
        names: (G,) gene names; repeats are merged.
        ids: (G,) gene ids; the names where the source has none.
        counts: (S, G) CSR of integers or floats; not altered.
        table: which identifiers belong together.
        target: see `GeneTable.check_target`. One-to-one and many-to-one orthologs are mapped (the
            many are summed); a gene with several orthologs is lost as "several orthologs".
        organism: use the rows of this organism only; "" uses all. It keeps apart genes of two
            organisms that share a symbol or an alias.

    Returns:
        names (H,) unique, in the order of their first source; ids (H,): the smallest id of the
        source (target "id": the names); counts (S, H) CSR, int32 or float32; the report.

    Raises:
        DataError: shapes that do not fit, an unknown target or organism, orthologs wanted of a
            table of two organisms without saying which the slide is, a sum above the int32 range,
            or no gene left.
    """
    table.check_target(target)
    before = [str(name) for name in names]
    keys = [str(key) for key in ids]
    if not len(before) == len(keys) == counts.shape[1]:
        raise DataError(
            f"{len(before)} gene names, {len(keys)} gene ids and counts of shape {counts.shape}; "
            "expected one name and one id a column"
        )
    finder = _Finder(_rows(table, target, organism), table, target)
    found = [finder(key, name) for key, name in zip(keys, before, strict=True)]
    order = list(dict.fromkeys(one.target for one in found if one.target))
    if not order:
        raise DataError(_nothing_left(table, target, keys, before, found))
    place = {name: column for column, name in enumerate(order)}
    column = np.array([place.get(one.target, -1) for one in found], dtype=np.int64)
    new_names = np.array(order, dtype=object)
    new_ids = new_names if target == ID else _merged_ids(keys, before, column, order, finder)
    report = _report(target, keys, before, found, order, _share(counts, column < 0))
    return new_names, new_ids, sum_columns(counts, column, len(order)), report


def map_spot_table(
    spots: SpotTable, table: GeneTable, target: str = SYMBOL, organism: str = ""
) -> tuple[SpotTable, GeneMapReport | None]:
    """Map the genes of one slide; the report is also added to its notes.

    A slide without counts stays as it is, and so does a panel of proteins (names of antibodies are
    no gene identifiers), with a note. An organism that the table does not name is noted too, and
    all rows are used.

    Raises:
        DataError: see `map_genes`.
    """
    if spots.image_only:
        return spots, None
    if spots.modality == PROTEIN:
        note = "genes not mapped: the panel measures proteins"
        return replace(spots, notes=(*spots.notes, note)), None
    notes = list(spots.notes)
    if organism and not table.of(organism):
        known = ", ".join(table.organisms) or "none named"
        notes.append(f"organism {organism!r} is not in the gene table ({known}): all rows used")
        organism = ""
    names, ids, counts, report = map_genes(
        spots.gene_names, spots.gene_ids, spots.counts, table, target, organism
    )
    notes += report.lines()
    before = {after: (key, name) for after, key, name in report.sources}
    sources = np.array([before[name] for name in names], dtype=object).T
    mapped = replace(
        spots,
        gene_names=names,
        gene_ids=ids,
        gene_sources=dict(zip(SOURCE_COLUMNS, sources, strict=True)),
        counts=counts,
        notes=tuple(notes),
    )
    return mapped, report


def apply_gene_map(spots: SpotTable, config: GeneMapConfig, organism: str = "") -> SpotTable:
    """Read the table of a configuration and map the genes of one slide; see `map_spot_table`."""
    return map_spot_table(spots, read_gene_table(config.table), config.target, organism)[0]


def sum_columns(counts: csr_matrix, column: np.ndarray, n_columns: int) -> csr_matrix:
    """Sum columns into new ones, a piece of the rows at a time.

    Args:
        counts: (S, G) CSR, integers or floats.
        column: (G,) new column of each, -1: left out.
        n_columns: H.

    Returns:
        (S, H) canonical CSR; int32 for integers, float32 for floats.

    Raises:
        DataError: a sum above the int32 range.
    """
    whole = counts.dtype.kind in "iub"
    used = np.flatnonzero(column >= 0)
    wide = np.int64 if whole else np.float64
    ones = np.ones(len(used), dtype=wide)
    summing = csr_matrix((ones, (used, column[used])), (counts.shape[1], n_columns))
    check = integer_counts if whole else intensities
    pieces = [check(piece.astype(wide) @ summing) for piece in _row_pieces(counts)]
    return pieces[0] if len(pieces) == 1 else vstack(pieces, format="csr")


def _row_pieces(counts: csr_matrix) -> Iterator[csr_matrix]:
    """Yield the rows in runs of about `_PIECE` stored values; one empty run without rows."""
    rows, start = counts.shape[0], 0
    while start < rows:
        limit = counts.indptr[start] + _PIECE
        stop = int(np.searchsorted(counts.indptr, limit, side="right")) - 1
        stop = min(rows, max(stop, start + 1))
        yield counts[start:stop]
        start = stop
    if rows == 0:
        yield counts


class _Finder:
    """Looks genes up in a table: id, then symbol, then alias."""

    def __init__(self, genes: Iterable[Gene], table: GeneTable, target: str) -> None:
        self.levels: tuple[dict[str, frozenset[str]], ...] = ({}, {}, {})
        self.several: set[str] = set()
        for gene in genes:
            wanted = table.targets(gene, target)
            for key in {gene.id, without_version(gene.id)}:
                self._add(0, key, wanted)
            self._add(1, gene.symbol, wanted)
            for alias in gene.aliases:
                self._add(2, alias, wanted)
            if target not in (ID, SYMBOL):  # what is already as wanted stays
                for name in wanted:
                    self._add(1, name, frozenset([name]))
            if len(wanted) > 1:
                self.several.update((gene.id, without_version(gene.id), gene.symbol))

    def _add(self, level: int, key: str, wanted: frozenset[str]) -> None:
        if key:
            self.levels[level][key] = self.levels[level].get(key, frozenset()) | wanted

    def __call__(self, key: str, name: str) -> Found:
        """Find a gene by its id in the source and its name."""
        texts = (key, name)
        tries: tuple[Callable[[str], str], ...] = (str, without_version, str, str)
        for level, form in zip((0, 0, 1, 2), tries, strict=True):
            for text in map(form, texts):
                if text in self.levels[level]:
                    return self._outcome(text, self.levels[level][text])
        return Found(reason=UNKNOWN)

    def _outcome(self, text: str, wanted: frozenset[str]) -> Found:
        if len(wanted) == 1:
            return Found(next(iter(wanted)))
        if not wanted:
            return Found(reason=NO_TARGET)
        return Found(reason=SEVERAL if text in self.several else AMBIGUOUS)


def _rows(table: GeneTable, target: str, organism: str) -> tuple[Gene, ...]:
    if not organism:
        if target == ORTHOLOG and len(table.organisms) > 1:
            raise DataError(
                f"{table.name} holds {', '.join(table.organisms)}, so target {ORTHOLOG!r} needs "
                "the slide's organism (manifest column organism); or name the organism whose "
                f"symbols are wanted as the target, such as {table.organisms[0]!r}"
            )
        return table.genes
    genes = table.of(organism)
    if not genes:
        known = ", ".join(table.organisms) or "none"
        raise DataError(f"{table.name} has no gene of organism {organism!r}; it names: {known}")
    return genes


def _merged_ids(
    keys: list[str], before: list[str], column: np.ndarray, order: list[str], finder: _Finder
) -> np.ndarray:
    """Smallest own id of the genes of each column; the target where none has an id of its own.

    A name that the table knows as an id is one: a source that has ids only keeps them.
    """
    result: dict[int, str] = {}
    for key, name, place in zip(keys, before, column.tolist(), strict=True):
        fits = (Found(order[place]), Found(reason=UNKNOWN))
        own = key != name or without_version(key) in finder.levels[0]
        if place >= 0 and own and finder(key, key) in fits:
            result[place] = min(result.get(place, key), key)
    return np.array([result.get(place, name) for place, name in enumerate(order)], dtype=object)


def _share(counts: csr_matrix, lost: np.ndarray) -> float:
    """Part of all counts that lies in the lost columns, 0..1."""
    total = float(counts.data.sum(dtype=np.float64))
    inside = float(counts.data[lost[counts.indices]].sum(dtype=np.float64))
    return inside / total if total else 0.0


def _nothing_left(
    table: GeneTable, target: str, keys: list[str], before: list[str], found: list[Found]
) -> str:
    reasons = {reason: sum(one.reason == reason for one in found) for reason in REASONS}
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    first = table.genes[0]
    return (
        f"none of {len(before)} genes can be mapped to {target} ({told or 'no gene'}); the slide "
        f"has {', '.join(before[:3])} (ids {', '.join(keys[:3])}), {table.name} has "
        f"{first.id or '-'} / {first.symbol or '-'}: give the table of the slide's organism"
    )
