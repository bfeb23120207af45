"""Predictions beside what was measured: `python benchmarks/predict.py PREDICTIONS STORES`.

PREDICTIONS: what `hibio predict` wrote for slides that its model never saw; STORES: their stores
with counts. One line a slide: in which order genes are predictable by their reliability, beside the
order by their predicted level (the baseline), and how often the intervals held.

Legend: S spots, T genes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
from scipy.stats import spearmanr

from eval.measures.metrics import pearson_per_gene
from hibio.data.counts import align_columns
from preprocessing.selection import normalised
from preprocessing.spot_table import RNA
from preprocessing.store import SlideStore

SHOWN = 50  # genes at the head of an order


def line(path: Path, stores: Path) -> str:
    """One row of the table."""
    adata = anndata.read_h5ad(path)
    adata = adata[:, adata.var["feature_type"] == "gene"].to_memory()
    slide = str(adata.uns["hibio"]["slide_id"])
    with SlideStore(stores / f"{slide}.h5") as store:
        counts = align_columns(store.counts(), store.gene_names, np.asarray(adata.var_names))
    truth_ST = normalised(counts, RNA).toarray()
    r_T = pearson_per_gene(np.asarray(adata.X), truth_ST)
    orders = {"reliability": adata.var["reliability"], "level": np.asarray(adata.X).mean(axis=0)}
    inside = (truth_ST >= adata.layers["lower"]) & (truth_ST <= adata.layers["upper"])
    cells = [slide, f"{np.nanmean(r_T):.3f}"]
    for order in orders.values():
        value_T = np.asarray(order, dtype=np.float64)
        known = np.isfinite(r_T) & np.isfinite(value_T)
        head = r_T[known][np.argsort(-value_T[known])[:SHOWN]].mean()
        cells += [f"{spearmanr(value_T[known], r_T[known]).statistic:.2f}", f"{head:.3f}"]
    return " | ".join([*cells, f"{inside.mean():.2f}"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("stores", type=Path)
    options = parser.parse_args()
    print(
        "slide | mean r | rank corr. by reliability | r of its 50 | by level | r of its 50 | held"
    )
    for path in sorted(options.predictions.glob("*.predict.h5ad")):
        print(line(path, options.stores), flush=True)


if __name__ == "__main__":
    main()
