"""Stores of synthetic sparse counts, written one after the other, and folders of very many stores.

A spot is a mixture of two of a few programmes (each a draw of gene shares), its depth is
log-normal; its counts are that many draws of genes. Only one slide is in memory at a time.

Legend: S spots, G genes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.spot_table import SpotTable
from preprocessing.store import write_store

GENES, PROGRAMMES = 2000, 12
DEPTH = 400  # counts of a median spot: about 250 genes of 2,000 are seen
PITCH_UM = 20.0


def programme_shares(seed: int = 0) -> np.ndarray:
    """Gene shares (PROGRAMMES, G), cumulative, each row ending at 1."""
    rng = np.random.default_rng(seed)
    shares = rng.gamma(0.4, size=GENES) * rng.gamma(1.0, size=(PROGRAMMES, GENES))
    return np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)


def draw_counts(n_spots: int, shares: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Counts (S, G) int32."""
    depth = np.maximum(20, rng.lognormal(np.log(DEPTH), 0.4, n_spots)).astype(np.int64)
    two = rng.integers(0, PROGRAMMES, (n_spots, 2))
    part = rng.random(n_spots)
    row = np.repeat(np.arange(n_spots, dtype=np.int32), depth)
    second = rng.random(len(row)) < part[row]
    programme = two[row, second.astype(np.int64)]
    order = np.argsort(programme, kind="stable")
    drawn = np.empty(len(row), dtype=np.int32)
    edges = np.searchsorted(programme[order], np.arange(PROGRAMMES + 1))
    for number in range(PROGRAMMES):
        mine = order[edges[number] : edges[number + 1]]
        drawn[mine] = np.searchsorted(shares[number], rng.random(len(mine)))
    drawn = np.minimum(drawn, GENES - 1)
    ones = np.ones(len(row), dtype=np.int32)
    counts = sparse.csr_matrix((ones, (row, drawn)), shape=(n_spots, GENES))
    counts.sum_duplicates()
    return counts


def write_slides(folder: Path, n_slides: int, n_spots: int, seed: int = 0) -> list[Path]:
    """Stores ``s00000.h5`` ... of ``n_spots`` spots each; those that are there already stay."""
    shares = programme_shares()
    paths = [folder / f"s{number:05d}.h5" for number in range(n_slides)]
    side = int(np.ceil(np.sqrt(n_spots)))
    place = np.arange(n_spots)
    xy = np.stack([place % side, place // side], axis=1) * PITCH_UM
    names = np.array([f"G{gene:04d}" for gene in range(GENES)])
    for number, path in enumerate(paths):
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number])
        table = SpotTable(
            counts=draw_counts(n_spots, shares, rng),
            gene_ids=names,
            gene_names=names,
            barcodes=np.array([f"b{spot}" for spot in place]),
            xy_px0=xy,
            xy_um=xy,
            mpp=1.0,
            diameter_um=None,
            labels=pd.DataFrame(index=pd.RangeIndex(n_spots)),
        )
        row = SlideRow(path.stem, f"p{number}", None, "csv", technology="synthetic")
        write_store(path, table, row, patches=None, patch=PatchConfig())
    return paths


def copies(source: Path, folder: Path, n_stores: int) -> list[Path]:
    """One store under many names (hard links where the file system has them)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{source.stem}-{number:06d}.h5" for number in range(n_stores)]
    for path in paths:
        if not path.exists():
            os.link(source, path)
    return paths
