"""Simulated sections beside real ones: `python benchmarks/realism.py stores/her2st stores/like`.

One column a folder of stores, one row a statistic: depth, detection, noise of the counts, spatial
order of genes, what the picture says about expression, and how far patients lie apart. Numbers of a
folder are medians over its sections (or patients) with the smallest and largest in brackets.
Statistics of pictures are of the sections with handcrafted features; nothing is trained.

Legend: S spots, G genes, F image features, V axes of the spot vector.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.graphs import KNNGraph
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

Doubles = NDArray[np.float64]
FEATURES = "handcrafted"
TARGETS = 50  # variable genes asked of the picture
TESTED = 500  # most detected genes, for Moran's I and the shares of variance
DETECTED = 0.1  # least share of spots with a target gene
PENALTY = 3000.0  # of ridge on standardised features; 1,000 to 30,000 give alike on HER2ST
AXES = 20
BLOCKS = 3  # of the sides of a section, for ridge within it


@dataclass(frozen=True)
class Section:
    """What is read of one store, genes in the order of the cohort: (S, G) counts."""

    slide_id: str
    patient_id: str
    counts: sparse.csr_matrix
    xy_um: Doubles
    feature_SF: Doubles | None

    @property
    def depth(self) -> Doubles:
        """(S,) counts of each spot, at least 1."""
        return np.maximum(np.asarray(self.counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)

    @cached_property
    def expression(self) -> Doubles:
        """(S, G) ln(1 + 10,000 x / depth)."""
        return log_normal(self.counts)


def log_normal(counts: sparse.csr_matrix) -> Doubles:
    """(S, G) dense ln(1 + 10,000 x / depth)."""
    depth = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64), 1.0)
    return np.asarray(np.log1p(counts.toarray() * (1e4 / depth.reshape(-1, 1))))


def read(folder: Path) -> list[Section]:
    """All sections of a folder, on the genes that every one of them has."""
    opened = [SlideStore(path) for path in stores_in(folder)]
    genes = sorted(set.intersection(*(set(store.gene_names.tolist()) for store in opened)))
    sections = []
    for store in opened:
        place = {name: g for g, name in enumerate(store.gene_names.tolist())}
        columns = [place[gene] for gene in genes]
        feature = None
        if store.n_patches and FEATURES in store.feature_names:
            feature = np.asarray(store.features(FEATURES), dtype=np.float64)
        counts = sparse.csr_matrix(store.counts()[:, columns])
        xy = np.asarray(store.xy_um, dtype=np.float64)
        sections.append(Section(store.slide_id, store.patient_id, counts, xy, feature))
        store.close()
    return sections


def zscore(values: Doubles) -> Doubles:
    """Columns with mean 0 and sd 1; constant ones are 0."""
    centred = values - values.mean(axis=0)
    return np.asarray(centred / np.maximum(values.std(axis=0), 1e-9))


def dispersion(section: Section) -> float:
    """Phi of var = mean + phi mean^2 of counts at one depth, median over the 200 leading genes.

    Spots below a quarter of the median depth are left out: their noise drowns the rest.
    """
    deep = section.depth >= np.median(section.depth) / 4
    depth = section.depth[deep]
    share = section.counts[deep].toarray() / depth[:, None]
    leading = np.argsort(-share.mean(axis=0))[:200]
    mean, variance = share[:, leading].mean(axis=0), share[:, leading].var(axis=0)
    return float(np.median((variance - mean * np.mean(1 / depth)) / mean**2))


def reliability(section: Section, columns: NDArray[np.int64]) -> float:
    """Correlation over spots of a gene between two random halves of the counts, median of genes."""
    half = section.counts.copy()
    half.data = np.random.default_rng(0).binomial(half.data.astype(np.int64), 0.5)
    other = sparse.csr_matrix(section.counts - half)
    one, two = zscore(log_normal(half)[:, columns]), zscore(log_normal(other)[:, columns])
    return float(np.median((one * two).mean(axis=0)))


def moran(section: Section, columns: NDArray[np.int64]) -> Doubles:
    """(genes,) Moran's I of log expression over six neighbours with equal weights."""
    graph = KNNGraph(k=6).build(section.xy_um).matrix()
    near = sparse.csr_matrix(graph / np.maximum(graph.sum(axis=1), 1).reshape(-1, 1))
    values = zscore(section.expression[:, columns])
    return np.asarray((values * (near @ values)).mean(axis=0))


def variable(sections: Sequence[Section]) -> NDArray[np.int64]:
    """The `TARGETS` detected genes that vary most within sections."""
    n_spots = sum(section.counts.shape[0] for section in sections)
    power = sum(s.expression.var(axis=0) * s.counts.shape[0] for s in sections) / n_spots
    often = sum((s.counts > 0).sum(axis=0) for s in sections) >= DETECTED * n_spots
    return np.lexsort((-power, ~np.asarray(often).ravel()))[:TARGETS]


def ridge(x: Doubles, y: Doubles, asked: Doubles) -> Doubles:
    """Ridge with `PENALTY` of (S, T) on (S, F), at other rows; all standardised before."""
    return np.asarray(asked @ np.linalg.solve(x.T @ x + PENALTY * np.eye(x.shape[1]), x.T @ y))


def correlation(one: Doubles, other: Doubles) -> float:
    """Mean Pearson over the columns."""
    return float(np.mean((zscore(one) * zscore(other)).mean(axis=0)))


def recall(predicted: Doubles, measured: Doubles) -> float:
    """Share of spots whose measured row is in the tenth of the pool nearest to the predicted."""
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (predicted, measured)]
    similarity = units[0] @ units[1].T
    rank = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    return float(np.mean(rank < max(1, round(0.1 * len(rank)))))


def held_out(pictured: Sequence[Section]) -> dict[str, list[float]]:
    """Each section by ridge on the other patients: P50, and R@10% of the predicted spot vector."""
    found: dict[str, list[float]] = {"pearson": [], "recall": []}
    for patient in sorted({section.patient_id for section in pictured}):
        train = [section for section in pictured if section.patient_id != patient]
        if not train:
            continue
        genes = variable(train)
        x = np.concatenate([zscore(s.feature_SF) for s in train])
        y = np.concatenate([zscore(s.expression[:, genes]) for s in train])
        whole = np.concatenate([s.expression - s.expression.mean(axis=0) for s in train])
        axes = np.linalg.eigh(whole.T @ whole)[1][:, -AXES:] if whole.shape[1] < 4000 else None
        if axes is None:
            left, size, _ = np.linalg.svd(whole @ whole.T, hermitian=True)
            axes = whole.T @ left[:, :AXES] / np.sqrt(size[:AXES])
        known = np.concatenate([zscore(s.expression @ axes) for s in train])
        for section in (s for s in pictured if s.patient_id == patient):
            asked = zscore(section.feature_SF)
            found["pearson"].append(correlation(ridge(x, y, asked), section.expression[:, genes]))
            vector = zscore(section.expression @ axes)
            found["recall"].append(recall(ridge(x, known, asked), vector))
    return found


def within(section: Section, genes: NDArray[np.int64]) -> float:
    """P50 by ridge inside one section, blocks of its area held out in turn."""
    side = [np.digitize(v, np.quantile(v, np.arange(1, BLOCKS) / BLOCKS)) for v in section.xy_um.T]
    block = side[0] * BLOCKS + side[1]
    x, y = zscore(section.feature_SF), zscore(section.expression[:, genes])
    predicted = np.zeros_like(y)
    for held in np.unique(block):
        own = block == held
        predicted[own] = ridge(x[~own], y[~own], x[own])
    return correlation(predicted, y)


def between(parts: Sequence[tuple[str, Doubles]]) -> float:
    """Share of a column's variance between patients, median; ``parts``: patient and (S, C)."""
    means, weights = [], []
    inside = 0.0
    for patient in sorted({name for name, _ in parts}):
        rows = np.concatenate([values for name, values in parts if name == patient])
        means.append(rows.mean(axis=0))
        weights.append(len(rows))
        inside = inside + rows.var(axis=0) * len(rows)
    share = np.array(weights) / sum(weights)
    centre = share @ np.array(means)
    outside = share @ (np.array(means) - centre) ** 2
    total = outside + inside / sum(weights)
    return float(np.median(outside[total > 0] / total[total > 0]))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and, of several, the smallest and largest."""
    low, middle, high = np.min(values), np.median(values), np.max(values)
    texts = [f"{value:,.{digits}f}" for value in (middle, low, high)]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]}-{texts[2]})"


def log_sd(values: Sequence[float]) -> str:
    """Standard deviation of the logarithms; a dash for fewer than two."""
    return f"{np.std(np.log(values), ddof=1):.2f}" if len(values) > 1 else "-"


def statistics(sections: Sequence[Section]) -> dict[str, str]:
    """The column of one cohort."""
    patients = sorted({section.patient_id for section in sections})
    medians = [float(np.median(section.depth)) for section in sections]
    of_patient = [
        float(
            np.exp(
                np.mean(
                    [np.log(m) for m, s in zip(medians, sections, strict=True) if s.patient_id == p]
                )
            )
        )
        for p in patients
    ]
    detected = np.asarray(sum((s.counts > 0).sum(axis=0) for s in sections)).ravel()
    n_spots = sum(section.counts.shape[0] for section in sections)
    tested, genes = np.argsort(-detected, kind="stable")[:TESTED], variable(sections)
    order = [np.quantile(moran(section, tested), (0.5, 0.9, 0.99)) for section in sections]
    column = {
        "sections, patients": f"{len(sections)}, {len(patients)}",
        "spots a section": spread([s.counts.shape[0] for s in sections], 0),
        "genes in common": f"{len(detected):,}",
        "genes in a tenth of the spots": f"{np.sum(detected >= DETECTED * n_spots):,}",
        "counts a spot": spread(medians, 0),
        "its log sd within a section": spread(
            [float(np.std(np.log(s.depth))) for s in sections], 2
        ),
        "its log sd between patients": log_sd(of_patient),
        "genes a spot": spread([float(np.median(s.counts.getnnz(axis=1))) for s in sections], 0),
        "zeros": spread([1 - s.counts.nnz / np.prod(s.counts.shape) for s in sections]),
        "dispersion phi": spread([dispersion(section) for section in sections], 2),
        "reliability of 50 variable genes": spread([reliability(s, genes) for s in sections], 2),
    }
    for name, values in zip(("median", "90 %", "99 %"), np.transpose(order), strict=True):
        column[f"Moran's I of 500 genes, {name}"] = spread(values, 2)
    if len(patients) > 1:
        column["genes: variance between patients"] = (
            f"{between([(s.patient_id, s.expression[:, tested]) for s in sections]):.3f}"
        )
    return column | picture_statistics([s for s in sections if s.feature_SF is not None])


def picture_statistics(pictured: Sequence[Section]) -> dict[str, str]:
    """What the picture says: of the sections that have one."""
    if not pictured:
        return {}
    genes = variable(pictured)
    column = {"P50 by ridge within a section": spread([within(s, genes) for s in pictured])}
    found = held_out(pictured)
    if found["pearson"]:
        column["P50 by ridge, held-out patient"] = spread(found["pearson"])
        column["R@10% by ridge, held-out patient"] = spread(found["recall"])
        features = [(s.patient_id, s.feature_SF) for s in pictured]
        column["image features: variance between patients"] = f"{between(features):.3f}"
    return column


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stores", type=Path, nargs="+", help="folders of stores")
    given = parser.parse_args()
    columns = {folder.name: statistics(read(folder)) for folder in given.stores}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(c.get(name, "-") for c in columns.values()) + " |")


if __name__ == "__main__":
    main()
