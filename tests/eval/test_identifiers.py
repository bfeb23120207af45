"""What the source called a gene and a spot stays in the store and in every file that comes out."""

import csv
import dataclasses
import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack

from eval.embed import embed_folder
from eval.export import export_folder
from eval.predict import Wanted, predict_folder
from eval.query import query_folder
from hibio.checkpoint import READOUT
from hibio.cli import main
from hibio.readout import read_readout, write_readout
from preprocessing import SlideStore, SpotTable
from preprocessing.findings import failed
from preprocessing.gene_ids import map_spot_table
from preprocessing.gene_ids.table import Gene, GeneTable
from preprocessing.hest_layout import write_hest
from preprocessing.slide_row import SlideRow
from preprocessing.store import SlidePicture, verify_store, write_store
from tests.eval.image_cohort import PATCH, Cohort

SOURCES = ["source_id", "source_name"]


@pytest.fixture(scope="module")
def named(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose source had the first gene under two names, and the second under an old one."""
    folder = tmp_path_factory.mktemp("named")
    with SlideStore(cohort.stores / "sim001.h5") as store:
        today = store.gene_names.tolist()
        names = ["OLD0", today[0], "OLD1", *today[2:]]
        ids = [f"ENSG{900 + i:011d}.2" for i in range(len(names))]
        counts = store.counts()
        zero = csr_matrix((store.n_spots, 1), dtype=np.int32)
        table = SpotTable(
            hstack([zero, counts], format="csr"),
            np.array(ids, dtype=object),
            np.array(names, dtype=object),
            store.barcodes,
            store.xy_px0,
            store.xy_um,
            store.mpp,
        )
        genes = [
            Gene(f"ENSG{i:011d}", name, "", frozenset({f"OLD{i}"})) for i, name in enumerate(today)
        ]
        table, _ = map_spot_table(table, GeneTable(tuple(genes)))
        write_store(
            folder / "named.h5",
            table,
            SlideRow("named", "p", None, "visium"),
            patches=enumerate(store.patches()),
            patch=PATCH,
            features={"handcrafted": store.features("handcrafted")},
            tissue_fraction=store.tissue_fraction,
            picture=SlidePicture((9999, 9999), store.thumbnail, store.thumbnail_downsample),
        )
    return folder


def test_the_store_keeps_them(named: Path, cohort: Cohort):
    assert not failed(verify_store(named / "named.h5"))
    with SlideStore(named / "named.h5") as store:
        genes = store.genes()
        first = [f"ENSG{900 + i:011d}.2" for i in range(2)]
        assert genes["source_id"].tolist()[:2] == ["|".join(first), "ENSG00000000902.2"]
        assert genes["source_name"].tolist()[:2] == [
            "|".join(sorted(("OLD0", genes.index[0]))),
            "OLD1",
        ]
        assert genes["source_name"].tolist()[2:] == genes.index.tolist()[2:]
        assert genes["gene_id"].tolist() == store.gene_ids.tolist()
    with SlideStore(cohort.stores / "sim001.h5") as plain:
        assert plain.genes().columns.tolist() == ["gene_id"]


def test_every_export_has_them(named: Path, cohort: Cohort, tmp_path: Path):
    with SlideStore(named / "named.h5") as store:
        genes, barcodes = store.genes(), store.barcodes.tolist()
    embed_folder(cohort.checkpoint, named, tmp_path / "embed")
    (embedded,) = (tmp_path / "embed").glob("*.h5ad")
    query_folder(cohort.checkpoint, named, "default", tmp_path / "query")
    (predicted,) = predict_folder(cohort.checkpoint, [named], tmp_path / "predict", Wanted())
    assert main(["qc", str(named), "--out", str(tmp_path / "qc")]) == 0
    assert anndata.read_h5ad(embedded).var[["gene_id", *SOURCES]].equals(genes)
    for path in (embedded, tmp_path / "query" / "named.query.h5ad", predicted):
        assert anndata.read_h5ad(path).obs_names.tolist() == barcodes
    with (tmp_path / "query" / "named.query.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["barcode", *barcodes]
    with SlideStore(cohort.stores / "sim001.h5") as plain:
        trained = anndata.read_h5ad(predicted).var["gene_id"]
        assert trained.tolist() == plain.genes().loc[trained.index, "gene_id"].tolist()
    assert "named" in (tmp_path / "qc" / "qc.csv").read_text()
    for kind, data in (("heatmap", embedded), ("qc", named), ("regions", embedded)):
        names = (genes.index[0],) if kind == "heatmap" else ()
        (path,) = export_folder(kind, data, tmp_path / "geo", names)
        written = json.loads(path.read_text())
        if kind != "regions":
            assert [one["properties"]["name"] for one in written["features"]] == barcodes
        wanted = {genes.index[0]: genes.iloc[0].to_dict()} if kind == "heatmap" else None
        assert written.get("genes") == wanted


def test_the_layout_of_hest_and_the_read_out(named: Path, cohort: Cohort, tmp_path: Path):
    write_hest(named, tmp_path / "hest")
    with SlideStore(named / "named.h5") as store:
        sample = anndata.read_h5ad(tmp_path / "hest" / "st" / "named.h5ad")
        assert sample.var.equals(store.genes("gene_ids"))
    readout = read_readout(cohort.checkpoint / READOUT)
    ids = np.array([f"E{i}" for i in range(len(readout.names))])
    write_readout(tmp_path / READOUT, dataclasses.replace(readout, ids=ids))
    again = read_readout(tmp_path / READOUT)
    assert again.of(again.names[[3, 1]]).var(0.1)["gene_id"].tolist() == ["E3", "E1"]
