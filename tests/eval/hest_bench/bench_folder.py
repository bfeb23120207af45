"""The toy cohort of the simulator written as a task of HEST-Bench."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from eval.hest_bench.layout import Sample
from eval.hest_bench.samples import choose_genes, read_facts
from preprocessing.hest_layout import write_hest

TASK = "TOY"
SAMPLES = ("sim001", "sim002", "sim003")
N_GENES = 12


def write_bench(stores: Path, folder: Path, tests: Sequence[str] = SAMPLES) -> Path:
    """Each test sample in a fold of its own; genes chosen on all samples, as published.

    Returns:
        The folder of the task.
    """
    root = folder / TASK
    write_hest(stores, root)
    shutil.move(root / "st", root / "adata")
    samples = {
        name: Sample(name, root / "patches" / f"{name}.h5", root / "adata" / f"{name}.h5ad")
        for name in SAMPLES
    }
    sums = [read_facts(sample).sums for sample in samples.values()]
    genes = {"genes": list(choose_genes(sums, sums, N_GENES))}
    (root / "var_50genes.json").write_text(json.dumps(genes))
    for k, test in enumerate(tests):
        write_split(root, k, [name for name in SAMPLES if name != test], [test])
    return root


def write_split(root: Path, k: int, train: Sequence[str], test: Sequence[str]) -> None:
    """The two files of one fold."""
    (root / "splits").mkdir(exist_ok=True)
    for side, names in (("train", train), ("test", test)):
        rows = [(n, f"patches/{n}.h5", f"adata/{n}.h5ad") for n in names]
        write_csv(root / "splits" / f"{side}_{k}.csv", rows)


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """A split file with these rows."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sample_id", "patches_path", "expr_path"))
        writer.writerows(rows)


def write_embeddings(root: Path, out: Path, name: str, width: int, seed: int = 0) -> dict:
    """Random vectors for every sample, in the layout of the published tool."""
    found = {}
    for index, path in enumerate(sorted((root / "patches").glob("*.h5"))):
        rng = np.random.default_rng([seed, index])
        with h5py.File(path) as file:
            barcodes = np.ravel(file["barcode"][()])
        found[path.stem] = rng.standard_normal((len(barcodes), width)).astype(np.float32)
        target = out / root.name / name / f"{path.stem}.h5"
        target.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(target, "w") as file:
            file["embeddings"], file["barcodes"] = found[path.stem], barcodes[:, None]
    return found
