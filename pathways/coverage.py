"""Kinds of gene identifiers; how well a database and a panel fit, or why they do not."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathways.errors import PathwayError

AGREEMENT = 0.8  # share of the names that must have the form of one kind
MIN_MATCH = 0.02  # share of the smaller side that must match
ENSEMBL_VERSION = re.compile(r"(ENS[A-Z]{0,6}[GTP]\d{11})\.\d+(_PAR_Y)?")
#: The form of each kind of identifier; the first that fits names it.
KINDS = {
    "ensembl": re.compile(r"ENS[A-Z]{0,6}G\d{11}(\.\d+)?(_PAR_Y)?"),
    "entrez": re.compile(r"\d+"),
    "symbol": re.compile(r"(?=.*[A-Z])(?:[A-Z0-9]|C(?:\d+|X|Y)orf)[A-Z0-9._@-]*"),
    "mouse_symbol": re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._@()-]*"),
}
KIND_LABELS = {
    "symbol": "human gene symbols",
    "mouse_symbol": "mouse gene symbols",
    "ensembl": "Ensembl gene ids",
    "entrez": "Entrez gene ids",
    "unknown": "identifiers of an unknown kind",
}


def detect_id_type(names: Iterable[str]) -> str:
    """Say which kind of gene identifier these are.

    A kind is named only if at least 80 % of the names have its form; mixtures are "unknown".

    Returns:
        "symbol" (human, upper case), "mouse_symbol" (Actb, 0610009B22Rik), "ensembl", "entrez" or
        "unknown".
    """
    kinds = [_kind_of(str(name)) for name in names]
    for kind in KINDS if kinds else ():
        if kinds.count(kind) >= AGREEMENT * len(kinds):
            return kind
    return "unknown"


def _kind_of(name: str) -> str:
    return next((kind for kind, form in KINDS.items() if form.fullmatch(name)), "unknown")


def strip_versions(names: Iterable[str]) -> npt.NDArray[np.str_]:
    """Remove the version suffix of Ensembl identifiers; leave everything else as it is.

    ``ENSG00000141510.16`` becomes ``ENSG00000141510``; a symbol such as ``AC012345.1``, where the
    dot belongs to the name, stays. The ``_PAR_Y`` mark of GENCODE is kept, so that the two copies
    stay apart. Two versions of one gene become equal: check uniqueness where it matters.
    """
    stripped = []
    for name in names:
        match = ENSEMBL_VERSION.fullmatch(str(name))
        stripped.append(match[1] + (match[2] or "") if match else str(name))
    return np.array(stripped, dtype=np.str_)


@dataclass(frozen=True, eq=False)
class CoverageReport:
    """What ``PathwayDatabase.restrict`` kept and dropped.

    Attributes:
        database: Name of the database.
        n_sets: Sets before.
        n_kept: Sets after.
        n_too_small: Dropped, fewer than ``min_genes`` genes in the panel.
        n_too_large: Dropped, more than ``max_genes`` genes in the panel.
        n_genes: Different genes in the database.
        n_matched: Of them, in the panel.
        n_panel: Genes of the panel.
        table: One row a set: set, n_genes, n_matched, coverage (0-1), status (kept, too_small or
            too_large).
    """

    database: str
    n_sets: int
    n_kept: int
    n_too_small: int
    n_too_large: int
    n_genes: int
    n_matched: int
    n_panel: int
    table: pd.DataFrame

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"{self.database}: {self.n_kept:,} of {self.n_sets:,} sets kept "
            f"({self.n_too_small:,} too small, {self.n_too_large:,} too large); "
            f"{self.n_matched:,} of {self.n_genes:,} genes in the panel of {self.n_panel:,}"
        )


def count_coverage(
    database: str, table: pd.DataFrame, panel: Collection[str], min_genes: int, max_genes: int
) -> CoverageReport:
    """Count per set of a long table how many genes the panel has; sets in order of first row."""
    present = table["target"].isin(list(panel))
    grouped = present.groupby(table["source"], sort=False)
    size, matched = grouped.size(), grouped.sum()
    status = np.where(
        matched < min_genes, "too_small", np.where(matched > max_genes, "too_large", "kept")
    )
    per_set = pd.DataFrame(
        {
            "set": size.index.to_numpy(),
            "n_genes": size.to_numpy(),
            "n_matched": matched.to_numpy().astype(int),
            "coverage": (matched / size).to_numpy(),
            "status": status,
        }
    )
    return CoverageReport(
        database=database,
        n_sets=len(per_set),
        n_kept=int((status == "kept").sum()),
        n_too_small=int((status == "too_small").sum()),
        n_too_large=int((status == "too_large").sum()),
        n_genes=int(table["target"].nunique()),
        n_matched=int(table.loc[present, "target"].nunique()),
        n_panel=len(panel),
        table=per_set,
    )


def check_coverage(
    report: CoverageReport, targets: Iterable[str], panel: Iterable[str], bounds: tuple[int, int]
) -> None:
    """Refuse a database that does not speak about this panel.

    Raises:
        PathwayError: Fewer than 2 % of the smaller side match, or no set is within the bounds.
    """
    smaller = min(report.n_genes, report.n_panel)
    if report.n_matched == 0 or report.n_matched < MIN_MATCH * smaller:
        raise PathwayError(
            f"{report.database}: {report.n_matched} of {report.n_genes:,} set genes are in the "
            f"panel of {report.n_panel:,} genes. {explain_mismatch(targets, panel)}"
        )
    if report.n_kept == 0:
        raise PathwayError(
            f"{report.database}: none of {report.n_sets:,} sets has {bounds[0]} to {bounds[1]} "
            f"genes in the panel of {report.n_panel:,} genes (the largest has "
            f"{report.table['n_matched'].max()}; {report.n_too_small} too small, "
            f"{report.n_too_large} too large). Change min_genes / max_genes, or use another "
            "database."
        )


def explain_mismatch(targets: Iterable[str], panel: Iterable[str]) -> str:
    """Sentences that say why the genes of sets and of a panel do not match, and the remedy."""
    targets, panel = [str(g) for g in targets], [str(g) for g in panel]
    return (
        f"The sets use names like {_examples(targets)}; the panel has names like "
        f"{_examples(panel)}. {_likely_cause(targets, panel)}"
    )


def _examples(names: list[str]) -> str:
    return ", ".join(names[:3]) if names else "(none)"


def _likely_cause(targets: list[str], panel: list[str]) -> str:
    """The remedy for the most likely cause."""
    kinds = detect_id_type(targets), detect_id_type(panel)
    organisms = _organism(kinds[0], targets), _organism(kinds[1], panel)
    if "" not in organisms and organisms[0] != organisms[1]:
        return (
            f"The sets are {organisms[0]} ({KIND_LABELS[kinds[0]]}), the panel {organisms[1]} "
            f"({KIND_LABELS[kinds[1]]}): use a {organisms[1]} collection, or map the sets by a "
            "table of orthologs; changing upper and lower case is not a mapping."
        )
    if kinds[0] != kinds[1] and "unknown" not in kinds:
        return (
            f"The sets use {KIND_LABELS[kinds[0]]}, the panel {KIND_LABELS[kinds[1]]}: pass the "
            f"panel's {KIND_LABELS[kinds[0]]} instead, or load sets with {KIND_LABELS[kinds[1]]}."
        )
    if set(strip_versions(targets)) & set(strip_versions(panel)):
        return (
            "They match without the version suffix (ENSG00000141510.16): pass both through "
            "pathways.strip_versions first."
        )
    if {g.upper() for g in targets} & {g.upper() for g in panel}:
        return (
            "Some match when upper and lower case are ignored: probably mouse symbols (Actb) "
            "against human ones (ACTB). Use a collection of the right organism."
        )
    return (
        "No common form was found: check organism, kind of identifier and that the file is the "
        "right one."
    )


def _organism(kind: str, names: list[str]) -> str:
    """Organism that the identifiers themselves tell, or ""."""
    if kind == "ensembl":
        prefixes = {name.split("0", 1)[0] for name in names if name.startswith("ENS")}
        return {"ENSG": "human", "ENSMUSG": "mouse"}.get("".join(prefixes), "")
    return {"symbol": "human", "mouse_symbol": "mouse"}.get(kind, "")
