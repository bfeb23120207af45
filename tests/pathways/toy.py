"""A toy panel, database and TF-IDF blocks for the tests of anchors and queries."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csr_matrix

from pathways import GeneSet, PathwayAnchors, PathwayDatabase, fit_anchors

N_GENES = 60
N_SETS = 7


@dataclass(frozen=True)
class Toy:
    """Panel, idf, database, training blocks and their dense stack."""

    genes: list[str]
    idf: npt.NDArray[np.float64]
    database: PathwayDatabase
    blocks: list[csr_matrix]
    anchors: PathwayAnchors

    @property
    def tfidf(self) -> csr_matrix:
        """All training spots (S, G)."""
        return csr_matrix(sparse.vstack(self.blocks))


def unit_rows(n_spots: int, seed: int) -> csr_matrix:
    """Random sparse rows (S, G) of length 1."""
    rng = np.random.default_rng(seed)
    dense = rng.gamma(1.0, size=(n_spots, N_GENES)) * (rng.random((n_spots, N_GENES)) < 0.4)
    dense[:, 0] += 0.1
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    return csr_matrix(dense.astype(np.float32))


def make_toy(seed: int = 0) -> Toy:
    """A fitted toy."""
    rng = np.random.default_rng(seed)
    genes = [f"G{i}" for i in range(N_GENES)]
    sets = [
        GeneSet(f"P{p}", "", tuple(f"G{g}" for g in rng.choice(N_GENES, 5 + p, replace=False)))
        for p in range(N_SETS)
    ]
    table = PathwayDatabase.from_sets(sets, "toy").table
    table = table.assign(weight=rng.choice([-1.0, 0.5, 1.0, 2.0], size=len(table)))
    database = PathwayDatabase("toy", table)
    idf = 1.0 + rng.random(N_GENES)
    blocks = [unit_rows(n, seed + i) for i, n in enumerate((13, 1, 30))]
    return Toy(genes, idf, database, blocks, fit_anchors(database, genes, idf, blocks))
