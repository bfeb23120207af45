"""TF-IDF against scikit-learn in one run: `python benchmarks/tfidf.py [--spots 200000]`.

Fit and transform of one matrix in memory, ours and `TfidfTransformer`, in turn; the best of the
rounds counts. `raw` is what scikit-learn computes (checked: the values are equal); for `log` it is
given ln(1 + 1e4 share), made by SciPy inside the time. One row a type of the counts.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from scipy import sparse
from sklearn import __version__
from sklearn.feature_extraction.text import TfidfTransformer
from timing import in_turn

from preprocessing.tfidf import TfidfReweighter

DIFFERENT = 20_000  # spots that are drawn; the others repeat them


def draw(n_spots: int, n_genes: int, n_seen: int) -> sparse.csr_matrix:
    """Counts (S, G) int32, each spot with the same number of genes."""
    rng = np.random.default_rng(0)
    n_drawn = min(n_spots, DIFFERENT)
    gene = np.sort(rng.integers(0, n_genes - n_seen + 1, (n_drawn, n_seen), dtype=np.int32), axis=1)
    gene += np.arange(n_seen, dtype=np.int32)  # sorted, none twice
    count = rng.geometric(0.5, gene.shape).astype(np.int32)
    pointer = np.arange(n_drawn + 1) * n_seen
    part = sparse.csr_matrix((count.ravel(), gene.ravel(), pointer), shape=(n_drawn, n_genes))
    return sparse.vstack([part] * (n_spots // n_drawn)).tocsr()


def ours(counts: sparse.csr_matrix, variant: str) -> sparse.csr_matrix:
    """Fit and transform."""
    return TfidfReweighter(variant).fit(counts).transform(counts)


def theirs(counts: sparse.csr_matrix, variant: str) -> sparse.csr_matrix:
    """The same by scikit-learn; `raw` needs no division by depth, which the unit length undoes."""
    if variant == "log":
        depth = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        share = counts.data / np.repeat(depth, np.diff(counts.indptr))
        parts = (np.log1p(1e4 * share), counts.indices, counts.indptr)
        counts = sparse.csr_matrix(parts, shape=counts.shape)
    return TfidfTransformer().fit_transform(counts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--spots", type=int, default=200_000, help="a multiple of 20,000 above it")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--seen", type=int, default=600, help="genes of a spot")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, numpy {np.__version__}, scikit-learn {__version__}")
    whole = draw(given.spots, given.genes, given.seen)
    print("| variant | counts | ours, s (all) | scikit-learn, s (all) | scikit-learn / ours |")
    print("|---|---|---|---|---|")
    for variant in ("raw", "log"):
        few = whole[:500]
        np.testing.assert_allclose(ours(few, variant).data, theirs(few, variant).data, rtol=1e-5)
        for kind in (np.int32, np.float32, np.float64):
            counts = whole.astype(kind)
            taken = in_turn(
                {
                    "ours": lambda counts=counts, variant=variant: ours(counts, variant),
                    "theirs": lambda counts=counts, variant=variant: theirs(counts, variant),
                },
                given.rounds,
            )
            cells = [
                f"{min(every):.2f} ({', '.join(f'{one:.2f}' for one in every)})"
                for every in taken.values()
            ]
            ratio = min(taken["theirs"]) / min(taken["ours"])
            print(
                f"| {variant} | {np.dtype(kind)} | {' | '.join(cells)} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
