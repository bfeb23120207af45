"""Tiny single-cell files for the tests: AnnData, loom, text tables, Xenium and CosMx folders."""

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csc_matrix, csr_matrix

from preprocessing.slide_row import SlideRow
from tests.preprocessing.sources import draw_counts

CELLS, GENES = 12, 5
NAMES = [f"G{g}" for g in range(GENES)]
BARCODES = [f"c{i}" for i in range(CELLS)]


def draw_xy(cells: int = CELLS, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((cells, 2)).round(4) * 1000


def cell_row(counts: Path, form: str, **more: object) -> SlideRow:
    return SlideRow("s1", "p1", counts, form, **({"mpp": 0.5} | more))  # type: ignore[arg-type]


def toy_anndata(counts: np.ndarray | None = None, *, spatial: str | None = "spatial"):
    """12 cells x 5 genes with obs kind (a category), depth (numbers) and activity:one."""
    counts = draw_counts(CELLS, GENES) if counts is None else counts
    cells = len(counts)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical([["a", "b", None][i % 3] for i in range(cells)]),
            "depth": np.arange(cells) * 1.5,
            "activity:one": np.arange(cells) / 4,
            "cluster": np.arange(cells) % 2,
        },
        index=[f"c{i}" for i in range(cells)],
    )
    var = pd.DataFrame(index=[f"G{g}" for g in range(counts.shape[1])])
    data = anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    if spatial is not None:
        data.obsm[spatial] = draw_xy(cells)
    return data


def write_h5ad(folder: Path, data: anndata.AnnData, name: str = "a.h5ad") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data.write_h5ad(folder / name)
    return folder / name


def write_loom(
    path: Path, counts: np.ndarray | None = None, **columns: np.ndarray | list[str] | None
) -> Path:
    """Genes x cells with Gene, CellID, X, Y, Region, Valid and Area; None leaves one out."""
    counts = draw_counts(CELLS, GENES) if counts is None else counts
    xy = draw_xy(len(counts))
    values: dict[str, object] = {
        "CellID": [f"c{i}" for i in range(len(counts))],
        "X": xy[:, 0],
        "Y": xy[:, 1],
        "Region": ["up" if i % 2 else "down" for i in range(len(counts))],
        "Valid": np.arange(len(counts)) >= 2,
        "Area": np.arange(len(counts)) * 2.0,
    } | columns
    with h5py.File(path, "w") as file:
        file["matrix"] = counts.T
        file["row_attrs/Gene"] = np.array([f"G{g}" for g in range(counts.shape[1])], dtype="S")
        group = file.create_group("col_attrs")
        for name, column in values.items():
            if column is not None:
                array = np.asarray(column)
                group[name] = array.astype("S") if array.dtype.kind == "U" else array * 1
    return path


def write_table(path: Path, header: list[str], rows: list[list[object]], separator=",") -> Path:
    """A text table; gzipped where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(map(str, row)) for row in [header, *rows]]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def csv_pair(folder: Path, counts: np.ndarray | None = None) -> tuple[Path, Path, np.ndarray]:
    """counts.csv and cells.csv keyed by cell_id; returns the counts too."""
    counts = draw_counts(CELLS, GENES) if counts is None else counts
    xy = draw_xy(len(counts))
    genes = [f"G{g}" for g in range(counts.shape[1])]
    first = write_table(
        folder / "counts.csv",
        ["cell_id", *genes],
        [[f"c{i}", *row] for i, row in enumerate(counts.tolist())],
    )
    second = write_table(
        folder / "cells.csv",
        ["cell_id", "x", "y", "kind", "area"],
        [[f"c{i}", x, y, "ab"[i % 2], i / 2] for i, (x, y) in enumerate(xy.tolist())],
    )
    return first, second, counts


def xenium_folder(folder: Path, *, h5: bool = True) -> np.ndarray:
    """Five genes, one control probe and one protein; returns counts (12, 7) in that order."""
    counts = draw_counts(CELLS, GENES + 2)
    ids = [*(f"ENSG{g}" for g in range(GENES)), "NegControlProbe_1", "CD3"]
    names = [*NAMES, "NegControlProbe_1", "CD3"]
    kinds = ["Gene Expression"] * GENES + ["Negative Control Probe", "Protein Expression"]
    folder.mkdir(parents=True, exist_ok=True)
    matrix = csc_matrix(counts.T)
    if h5:
        with h5py.File(folder / "cell_feature_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(matrix, key)
            group["shape"] = matrix.shape
            group["barcodes"] = np.array(BARCODES, dtype="S")
            for key, values in (("id", ids), ("name", names), ("feature_type", kinds)):
                group[f"features/{key}"] = np.array(values, dtype="S")
    else:
        mex = folder / "cell_feature_matrix"
        mex.mkdir()
        coo = matrix.tocoo()
        lines = ["%%MatrixMarket matrix coordinate integer general"]
        lines.append(f"{matrix.shape[0]} {matrix.shape[1]} {matrix.nnz}")
        lines += [
            f"{r + 1} {c + 1} {v}" for r, c, v in zip(coo.row, coo.col, coo.data, strict=True)
        ]
        (mex / "matrix.mtx").write_text("\n".join(lines) + "\n")
        (mex / "barcodes.tsv").write_text("\n".join(BARCODES) + "\n")
        rows = zip(ids, names, kinds, strict=True)
        (mex / "features.tsv").write_text("\n".join(map("\t".join, rows)) + "\n")
    xy = draw_xy()
    order = np.random.default_rng(5).permutation(CELLS)
    write_table(
        folder / "cells.csv.gz",
        ["cell_id", "x_centroid", "y_centroid", "cell_area", "segmentation_method"],
        [[BARCODES[i], *xy[i], 9.5, "nucleus" if i % 2 else "stain"] for i in order],
    )
    return counts


def cosmx_folder(folder: Path) -> np.ndarray:
    """Two fields with 5 cells each and cell_ID 0; G0..G2 and a NegPrb; returns counts (10, 3)."""
    counts = draw_counts(10, 4)
    keys = [(fov, cell) for fov in (1, 2) for cell in range(1, 6)]
    rows = [[*key, *row] for key, row in zip(keys, counts.tolist(), strict=True)]
    write_table(
        folder / "S_exprMat_file.csv",
        ["fov", "cell_ID", "G0", "G1", "G2", "NegPrb1"],
        [[1, 0, 90, 90, 90, 90], *rows, [2, 0, 90, 90, 90, 90]],
    )
    xy = draw_xy(10)
    write_table(
        folder / "S_metadata_file.csv.gz",
        ["fov", "cell_ID", "Area", "CenterX_local_px", "CenterX_global_px", "CenterY_global_px"],
        [[*key, 100, 1, x, y] for key, (x, y) in zip(keys, xy.tolist(), strict=True)],
    )
    return counts[:, :3]


def merscope_folder(folder: Path) -> np.ndarray:
    """A region of MERSCOPE: 12 cells with ids of 19 digits, two of the genes are blanks."""
    folder.mkdir(parents=True)
    cells = [str(1017155956100330000 + 7 * i) for i in range(CELLS)]
    counts = draw_counts(CELLS, GENES + 2)
    names = [*NAMES, "Blank-1", "Blank-12"]
    table = pd.DataFrame(counts, pd.Index(cells, name="cell"), names)
    table.to_csv(folder / "cell_by_gene.csv")
    xy = draw_xy()
    places = {"fov": 0, "volume": 300.5, "center_x": xy[:, 0], "center_y": xy[:, 1]}
    pd.DataFrame(places, pd.Index(cells, name="EntityID")).to_csv(folder / "cell_metadata.csv")
    return counts[:, :GENES]
