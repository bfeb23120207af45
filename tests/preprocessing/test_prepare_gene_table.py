"""`hibio prepare --gene-table` and `--layout hest`, on the toy cohort's real files."""

import anndata
import numpy as np
import pytest

from hibio.cli import main
from preprocessing import SlideStore, stores_in


@pytest.fixture(scope="module")
def gene_names(toy_stores) -> list[str]:
    with SlideStore(toy_stores / "sim001.h5") as store:
        return store.gene_names.tolist()


def prepared(toy_cohort, out, *more: str) -> int:
    return main(["prepare", str(toy_cohort), "--out", str(out), "--patch-px", "32", *more])


def write_table(path, names: list[str]) -> None:
    """Ids for the genes; the second is an alias of the first, the last is not in the table."""
    rows = [f"ENSG{i:011d}\t{name}\thuman\t" for i, name in enumerate(names[:-1]) if i != 1]
    rows[0] += names[1]
    path.write_text("id\tsymbol\torganism\taliases\n" + "\n".join(rows) + "\n")


def test_genes_are_named_by_the_table(toy_cohort, toy_stores, gene_names, tmp_path, capsys):
    table = tmp_path / "genes.tsv"
    write_table(table, gene_names)
    out = tmp_path / "stores"
    assert prepared(toy_cohort, out, "--gene-table", str(table)) == 0
    with SlideStore(toy_stores / "sim001.h5") as plain, SlideStore(out / "sim001.h5") as named:
        before, after = plain.counts().toarray(), named.counts().toarray()
        kept = named.gene_names.tolist()
        assert any("lost" in note for note in named.attrs["notes"])
    assert kept == [name for name in gene_names[:-1] if name != gene_names[1]]
    np.testing.assert_array_equal(after[:, 0], before[:, 0] + before[:, 1])  # merged
    np.testing.assert_array_equal(after[:, 1:], before[:, 2:-1])
    assert prepared(toy_cohort, out, "--gene-table", str(table)) == 0
    assert capsys.readouterr().out.count("skipped") == 3
    write_table(table, [gene_names[0], *gene_names[2:], "X"])  # another table: prepared anew
    assert prepared(toy_cohort, out, "--gene-table", str(table)) == 0
    assert capsys.readouterr().out.count("skipped") == 0


def test_a_bad_table_stops_before_the_first_slide(toy_cohort, tmp_path, capsys):
    table = tmp_path / "genes.tsv"
    table.write_text("gene\nA\n")
    assert prepared(toy_cohort, tmp_path / "stores", "--gene-table", str(table)) == 1
    told = capsys.readouterr().err
    assert "genes.tsv" in told
    assert "Traceback" not in told
    assert not list((tmp_path / "stores").glob("*.h5"))


def test_stores_are_written_in_the_layout_of_hest_too(toy_cohort, tmp_path, capsys):
    out = tmp_path / "stores"
    assert prepared(toy_cohort, out, "--layout", "hest") == 0
    assert "wrote 3 samples" in capsys.readouterr().out
    assert len(stores_in(out)) == 3
    sample = anndata.read_h5ad(out / "hest" / "st" / "sim001.h5ad")
    with SlideStore(out / "sim001.h5") as store:
        np.testing.assert_array_equal(sample.X.toarray(), store.counts().toarray())
        np.testing.assert_allclose(sample.obsm["spatial"], store.xy_px0)
