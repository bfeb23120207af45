"""Gene identifiers: each way of finding a gene, sums, order, idempotence, and the real tables."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from hibio.cli import main
from preprocessing import DataError, SpotTable
from preprocessing import gene_ids as module
from preprocessing.gene_ids import (
    GeneMapConfig,
    GeneMapReport,
    apply_gene_map,
    map_genes,
    map_spot_table,
    sum_columns,
)
from preprocessing.gene_ids.table import (
    Gene,
    GeneTable,
    draft_gene_table,
    read_gene_table,
    without_version,
)
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA

TP53, ACTB, GAPDH = "ENSG00000141510", "ENSG00000075624", "ENSG00000111640"
TEXT = f"""id\tsymbol\torganism\taliases\tortholog
{TP53}\tTP53\thuman\tp53|LFS1\tTrp53
{ACTB}.17\tACTB\thuman\tBRWS1\tActb
{GAPDH}\tGAPDH\thuman\tG3PD\tGapdh|Gapdhs
ENSG00000000001\tCALM1\thuman\tCALM|PHKD\tCalm1
ENSG00000000002\tCALM2\thuman\tCALM|PHKD2\tCalm1
ENSG00000000003\t\thuman\t\t
ENSMUSG00000059552\tTrp53\tmouse\tp53\tTP53
ENSMUSG00000029580\tActb\tmouse\t\tACTB
ENSMUSG00000000004\tH19\tmouse\t\t
"""


@pytest.fixture
def table(tmp_path) -> GeneTable:
    path = tmp_path / "genes.tsv"
    path.write_text(TEXT)
    return read_gene_table(path)


def mapped(
    names: list[str], table: GeneTable, target: str = "symbol", ids: list[str] | None = None, **how
) -> tuple[dict[str, int], GeneMapReport]:
    """Map genes whose counts are 1, 2, 4, ...: the sum of a gene tells what went into it."""
    counts = csr_matrix(2 ** np.arange(len(names))[None, :])
    new, _, sums, report = map_genes(names, ids or names, counts, table, target, **how)
    return dict(zip(new.tolist(), sums.toarray()[0].tolist(), strict=True)), report


@pytest.mark.parametrize(
    ("name", "target", "organism", "wanted"),
    [
        (TP53, "symbol", "", "TP53"),
        (f"{TP53}.16", "symbol", "", "TP53"),
        (ACTB, "symbol", "", "ACTB"),  # the table has a version, the slide has none
        (f"{ACTB}.3", "id", "", ACTB),
        ("BRWS1", "symbol", "", "ACTB"),
        ("ACTB", "id", "", ACTB),
        ("Trp53", "ortholog", "mouse", "TP53"),
        ("Trp53", "human", "", "TP53"),
        ("TP53", "human", "", "TP53"),
        ("TP53", "mouse", "", "Trp53"),
        ("ENSMUSG00000059552.8", "human", "", "TP53"),
        ("p53", "symbol", "Mouse", "Trp53"),
        ("p53", "symbol", "human", "TP53"),
        ("H19", "symbol", "", "H19"),
    ],
)
def test_a_gene_is_found(table, name, target, organism, wanted):
    found, report = mapped([name], table, target, organism=organism)
    assert list(found) == [wanted]
    assert (report.n_in, report.n_out, report.n_lost) == (1, 1, 0)
    assert len(report.kept) == (name == wanted)


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("p53", "symbol", "ambiguous"),  # of two organisms
        ("CALM", "symbol", "ambiguous"),  # alias of two genes
        ("tp53", "symbol", "not in the table"),  # case is not changed
        ("AC012345.1", "symbol", "not in the table"),
        ("ENSG00000141510.16_PAR_Y", "symbol", "not in the table"),
        ("ENSG00000000003", "symbol", "no such identifier"),
        ("H19", "human", "no such identifier"),
        ("GAPDH", "mouse", "several orthologs"),
        (GAPDH, "mouse", "several orthologs"),
    ],
)
def test_a_gene_that_cannot_be_named_is_lost_and_counted(table, name, target, reason):
    found, report = mapped(["ACTB", name], table, target)
    assert len(found) == 1
    assert report.lost == ((reason, (name,)),)
    assert report.lost_share == pytest.approx(2 / 3)
    assert any(f"lost, {reason}: 1 ({name})" in line for line in report.lines())
    with pytest.raises(DataError, match=rf"none of 1 genes.*1 {reason}.*organism"):
        mapped([name], table, target)


def test_the_report_counts_every_gene(table):
    names = ["BRWS1", "TP53", f"{TP53}.2", "ACTB", "NOPE", "CALM", "H19"]
    found, report = mapped(names, table)
    assert found == {"ACTB": 1 + 8, "TP53": 2 + 4, "H19": 64}
    assert report.kept == ("ACTB", "H19", "TP53")
    assert report.renamed == (("BRWS1", "ACTB"), (f"{TP53}.2", "TP53"))
    assert report.merged == (("ACTB", ("ACTB", "BRWS1")), ("TP53", (f"{TP53}.2", "TP53")))
    found = {after: (ids, before) for after, ids, before in report.sources}
    twice = f"{TP53}.2|TP53"
    assert found == {"ACTB": ("ACTB|BRWS1",) * 2, "TP53": (twice, twice), "H19": ("H19", "H19")}
    assert report.lost == (("not in the table", ("NOPE",)), ("ambiguous", ("CALM",)))
    assert len(report.kept) + len(report.renamed) + report.n_lost == report.n_in == 7
    assert str(report).splitlines()[0] == "genes mapped to symbol: 7 before, 3 after"
    assert "genes lost hold 37.80% of the counts" in report.lines()


def test_the_id_decides_before_the_name(table):
    found, _ = mapped(["ACTB", "old name", "CALM"], table, ids=[TP53, f"{ACTB}.2", "ENSG9"])
    assert found == {"TP53": 1, "ACTB": 2}


def test_ids_of_the_result(table):
    names = ["TP53", "p53-like", "ACTB", "CALM1"]
    ids = [f"{TP53}.9", f"{TP53}.16", "ACTB", "ENSG00000000099"]
    new, keys, _, _ = map_genes(names, ids, csr_matrix(np.eye(4, dtype=int)), table)
    # smallest own id; none of its own; unknown to the table but nothing speaks against it
    assert new.tolist() == ["TP53", "ACTB", "CALM1"]
    assert keys.tolist() == [f"{TP53}.16", "ACTB", "ENSG00000000099"]
    new, keys, _, _ = map_genes(names[:1], ids[:1], csr_matrix([[1]]), table, "id")
    assert (new.tolist(), keys.tolist()) == ([TP53], [TP53])


def test_many_orthologs_to_one_are_summed(table):
    found, report = mapped(["CALM1", "CALM2", "TP53"], table, "mouse")
    assert found == {"Calm1": 3, "Trp53": 4}
    assert report.merged == (("Calm1", ("CALM1", "CALM2")),)


def test_one_to_many_in_rows_of_their_own_is_the_same(tmp_path):
    (tmp_path / "t.tsv").write_text(
        "symbol\tid\torganism\tortholog\nGapdh\tM1\tmouse\tGAPDH\nGapdh\tM1\tmouse\tGAPDHS\n"
    )
    genes = read_gene_table(tmp_path / "t.tsv")
    assert genes.genes == (Gene("M1", "Gapdh", "mouse", frozenset(), {"GAPDH", "GAPDHS"}),)
    found, report = mapped(["Gapdh", "GAPDH"], genes, "ortholog")
    assert found == {"GAPDH": 2}  # what has the wanted name already stays
    assert report.lost == (("several orthologs", ("Gapdh",)),)


# Symbols A..H, ids E0..E7, aliases that may belong to several genes; capitals meet no alias.
ALIASES = [f"a{i}" for i in range(6)]
POOL = st.sampled_from(
    [
        *(f"ENSG{i:011d}" for i in range(8)),
        *(f"ENSG{i:011d}.{i}" for i in range(8)),
        *("A", "B", "C", "D", "E", "F", "G", "H", "other", "x", "z"),
        *ALIASES,
    ]
)


@st.composite
def gene_tables(draw) -> GeneTable:
    genes = [
        Gene(
            f"ENSG{i:011d}",
            symbol,
            "human",
            draw(st.frozensets(st.sampled_from(ALIASES), max_size=3)),
            draw(st.frozensets(st.sampled_from(["x", "y", "z"]), max_size=2)),
        )
        for i, symbol in enumerate("ABCDEFG")
    ]
    return GeneTable(tuple(genes))


@st.composite
def panels(draw) -> tuple[list[str], list[str], csr_matrix]:
    size = draw(st.integers(1, 10))
    names = draw(st.lists(POOL, min_size=size, max_size=size))
    ids = [draw(st.sampled_from([name, draw(POOL)])) for name in names]
    seed = draw(st.integers(0, 2**16))
    return names, ids, csr_matrix(np.random.default_rng(seed).poisson(1, (4, size)))


def attempt(panel, table: GeneTable, target: str):
    try:
        return map_genes(*panel, table, target)
    except DataError:  # nothing can be mapped
        return None


@settings(max_examples=200, deadline=None)
@given(panels(), gene_tables(), st.sampled_from(["symbol", "id", "ortholog"]))
def test_sums_order_and_idempotence(panel, table, target):
    names, ids, counts = panel
    done = attempt(panel, table, target)
    order = np.random.default_rng(0).permutation(len(names))
    turned = ([names[i] for i in order], [ids[i] for i in order], counts[:, order])
    again = attempt(turned, table, target)
    assert (done is None) == (again is None)
    if done is None:
        return
    new, keys, sums, report = done
    assert sums.dtype == np.int32
    assert len(set(new)) == len(new) == report.n_out
    # sums are preserved: what is not in the result is what the report calls lost
    assert sums.sum() == pytest.approx(counts.sum() * (1 - report.lost_share))
    assert len(report.kept) + len(report.renamed) + report.n_lost == report.n_in
    merged_away = sum(len(old) - 1 for _, old in report.merged)
    assert report.n_out == report.n_in - report.n_lost - merged_away
    # the order of the genes changes only the order of the result
    sort, back = np.argsort(new), np.argsort(again[0])
    assert new[sort].tolist() == again[0][back].tolist()
    assert keys[sort].tolist() == again[1][back].tolist()
    assert (sums[:, sort] != again[2][:, back]).nnz == 0
    assert again[3] == report
    # mapping the result changes nothing
    twice = map_genes(new, keys, sums, table, target)
    assert twice[0].tolist() == new.tolist()
    assert twice[1].tolist() == keys.tolist()
    assert (twice[2] != sums).nnz == 0
    assert (twice[3].kept, twice[3].n_lost) == (tuple(sorted(new)), 0)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_summed_columns_equal_a_slow_loop(monkeypatch, piece):
    monkeypatch.setattr(module, "_PIECE", piece)
    rng = np.random.default_rng(piece)
    dense = rng.poisson(0.5, (30, 12))
    column = rng.integers(-1, 4, 12)
    slow = np.zeros((30, 4), dtype=int)
    for spot in range(30):
        for gene in range(12):
            if column[gene] >= 0:
                slow[spot, column[gene]] += dense[spot, gene]
    fast = sum_columns(csr_matrix(dense), column, 4)
    np.testing.assert_array_equal(fast.toarray(), slow)
    floats = sum_columns(csr_matrix(dense / 4), column, 4)
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats.toarray(), slow / 4)


def test_a_sum_above_the_range_is_an_error():
    counts = csr_matrix(np.full((1, 2), 2**31 - 1, dtype=np.int32))
    with pytest.raises(DataError, match="not non-negative integers"):
        sum_columns(counts, np.zeros(2, dtype=int), 1)


def spots(names: list[str], **how) -> SpotTable:
    size = len(names)
    genes = np.array(names, dtype=object)
    xy = np.arange(4.0).reshape(2, 2)
    return SpotTable(
        csr_matrix(np.ones((2, size), dtype=int)), genes, genes, np.array(["s", "t"]), xy, xy, 1.0,
        **how,
    )  # fmt: skip


def test_a_slide_is_mapped_and_says_so(table, tmp_path):
    before = spots(["p53", "LFS1", "NOPE"], notes=("read",))
    after, report = map_spot_table(before, table, organism="Human")
    assert after.gene_names.tolist() == ["TP53"]
    np.testing.assert_array_equal(after.counts.toarray(), [[2], [2]])
    assert after.notes == ("read", *report.lines())
    assert before.gene_names.tolist() == ["p53", "LFS1", "NOPE"]
    noted, _ = map_spot_table(before, table, organism="Homo sapiens")
    assert "organism 'Homo sapiens' is not in the gene table (human, mouse)" in noted.notes[1]
    config = GeneMapConfig(tmp_path / "genes.tsv", "mouse")
    assert apply_gene_map(before, config, "human").gene_names.tolist() == ["Trp53"]


def test_slides_without_genes_stay(table):
    proteins = spots(["CD3", "TP53"], modality="protein")
    after, report = map_spot_table(proteins, table)
    assert report is None
    assert after.gene_names.tolist() == ["CD3", "TP53"]
    assert after.notes == ("genes not mapped: the panel measures proteins",)
    picture = SpotTable(
        csr_matrix((1, 0), dtype=np.int32), np.array([]), np.array([]), np.array(["s"]),
        np.zeros((1, 2)), np.zeros((1, 2)), 1.0, image_only=True,
    )  # fmt: skip
    assert map_spot_table(picture, table) == (picture, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\tsymbol\nE1\tA\n", "column organism is missing"),
        ("id\tsymbol\torganism\tchr\nE1\tA\thuman\tX\n", "unknown column 'chr'"),
        ("id\tsymbol\torganism\n\t\thuman\n", "line 2 has neither id nor symbol"),
        ("id\tsymbol\torganism\n", "has no gene"),
        ("id\tsymbol\torganism\nE1\tA\th\nA\tB\th\n", "'A' is the symbol of one gene and the id"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, words):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_gene_table(tmp_path / "t.tsv")


def test_a_bad_question_is_refused(table):
    with pytest.raises(DataError, match=r"'humna' is unknown; choose.*symbol, id, ortholog, human"):
        mapped(["TP53"], table, "humna")
    with pytest.raises(DataError, match="no gene of organism 'rat'"):
        mapped(["TP53"], table, organism="rat")
    three = GeneTable((*table.genes, Gene("R1", "Tp53", "rat")))
    with pytest.raises(DataError, match="3 organisms"):
        mapped(["TP53"], three, "human")
    with pytest.raises(DataError, match="needs the slide's organism"):
        mapped(["TP53"], table, "ortholog")
    with pytest.raises(DataError, match="1 gene names, 2 gene ids"):
        map_genes(["A"], ["A", "B"], csr_matrix((1, 1)), table)


def test_only_ensembl_versions_are_removed():
    for name in ("AC012345.1", "Y74C9A.3", "TP53", "ENSG1.2"):
        assert without_version(name) == name
    assert without_version("ENSMUSG00000059552.8") == "ENSMUSG00000059552"
    assert without_version("ENSG00000002586.20_PAR_Y") == "ENSG00000002586_PAR_Y"


WANTED = (
    Gene("E1", "MARCHF1", "human", frozenset({"MARCH1", "RNF171"}), frozenset({"Marchf1"})),
    Gene("E2", "TP53", "human", frozenset({"p53"}), frozenset({"Trp53", "Trp53b"})),
)


@pytest.mark.parametrize(
    "text",
    [
        "Gene stable ID,Gene name,Gene Synonym,Mouse gene name\nE1,MARCHF1,MARCH1,Marchf1\n"
        "E1,MARCHF1,RNF171,Marchf1\nE2,TP53,p53,Trp53\nE2,TP53,,Trp53b\n,,lost,\n",
        "hgnc_id\tsymbol\talias_symbol\tprev_symbol\tensembl_gene_id\tortholog\n"
        "1\tMARCHF1\tRNF171\tMARCH1\tE1\tMarchf1\n2\tTP53\tp53\t\tE2\tTrp53|Trp53b\n",
        "Approved symbol\tAlias symbols\tEnsembl gene ID\tMouse gene name\n"
        "MARCHF1\tRNF171, MARCH1\tE1\tMarchf1\nTP53\tp53\tE2\tTrp53; Trp53b\n",
    ],
    ids=["BioMart", "HGNC", "HGNC's page"],
)
def test_a_gene_table_of_others(tmp_path, text):
    (tmp_path / "source.txt").write_text(text)
    table = draft_gene_table(tmp_path / "source.txt", tmp_path / "out.tsv.gz", "human")
    assert table.genes == WANTED
    assert read_gene_table(tmp_path / "out.tsv.gz").genes == WANTED


def test_a_gene_table_of_features_and_pairs(tmp_path, capsys):
    source, pairs, out = (tmp_path / name for name in ("features.tsv", "pairs.csv", "out.tsv"))
    source.write_text(f"{ACTB}\tACTB\tGene Expression\n{TP53}\tTP53\tGene Expression\n")
    pairs.write_text("mouse,human\nTrp53,TP53\nTrp53b,TP53\nNA,ACTB\nActc1,ACTC1\n")
    argv = ["genes", str(source), "--out", str(out), "--orthologs", str(pairs)]
    assert main([*argv, "--organism", "human"]) == 0
    assert "2 genes of human, 0 with aliases, 1 with orthologs" in capsys.readouterr().out
    found = {gene.symbol: gene for gene in read_gene_table(out).genes}
    assert found["ACTB"] == Gene(ACTB, "ACTB", "human")
    assert found["TP53"].orthologs == {"Trp53", "Trp53b"}
    for name, text, told in (
        (source, "chrom,start\nX,1\n", "none of ids or symbols"),
        (pairs, "a,b\nFoo,Bar\n", "none of its symbols is one of the table"),
        (pairs, "a,b,c\nTP53,Trp53,1\n", "3 columns; expected two"),
    ):
        before = name.read_text()
        name.write_text(text)
        assert main(argv) == 1
        assert told in capsys.readouterr().err
        name.write_text(before)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_the_olfactory_bulb_with_real_tables(tmp_path):
    folder = REAL_DATA / "gene_tables"
    source, pairs = folder / "grcm38.tsv.gz", folder / "hgnc_mgi_orthologs.tsv.gz"
    table = draft_gene_table(source, tmp_path / "mouse.tsv.gz", "mouse", pairs)
    counts = pd.read_csv(REAL_DATA / "st_mob" / "MOB1.tsv.gz", sep="\t", index_col=0)
    names, matrix = counts.columns.tolist(), csr_matrix(counts.to_numpy())
    symbols, _, sums, report = map_genes(names, names, matrix, table)
    assert report.n_in == 1000
    assert report.n_lost < 20
    assert {"Penk", "Mbp", "Gpsm1"} & set(symbols)
    assert sums.sum() == pytest.approx(matrix.sum() * (1 - report.lost_share))
    _, _, _, report = map_genes(names, names, matrix, table, "ortholog")
    lost = {reason: len(names) for reason, names in report.lost}
    assert report.n_out > 800
    assert lost["no such identifier"] > lost["several orthologs"] > 0


def test_a_source_of_ids_only_keeps_them_beside_the_symbols():
    """As the olfactory bulb's mouse counts: names and ids are both Ensembl's."""
    table = GeneTable((Gene("ENSMUSG00000000001", "Gnai3"), Gene("ENSMUSG00000000028", "Cdc45")))
    keys = ["ENSMUSG00000000028.5", "ENSMUSG00000000001"]
    counts = csr_matrix(np.array([[1, 2], [3, 4]], dtype=np.int32))
    names, ids, _, _ = map_genes(keys, keys, counts, table)
    assert (names.tolist(), ids.tolist()) == (["Cdc45", "Gnai3"], keys)
    again = map_genes(names, ids, counts, table)
    assert (again[0].tolist(), again[1].tolist()) == (names.tolist(), keys)


def test_tables_of_r_arc_and_orthologs_without_a_header(tmp_path):
    source, pairs, out = tmp_path / "r.tsv", tmp_path / "pairs.tsv", tmp_path / "genes.tsv"
    source.write_text(f"SYMBOL\tENSEMBL\nTP53\t{TP53}\n\t{ACTB}\nACTB\t{GAPDH}\n")
    pairs.write_text("TP53\tTrp53\nACTB\tActb\n\tGm1\n")
    draft_gene_table(source, out, organism="human", orthologs=pairs)
    lines = [line.split("\t") for line in out.read_text().splitlines()]
    found = {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[1:]}
    assert [found[one]["symbol"] for one in (TP53, ACTB, GAPDH)] == ["TP53", "", "ACTB"]
    assert [found[one]["ortholog"] for one in (TP53, ACTB, GAPDH)] == ["Trp53", "", "Actb"]
    (tmp_path / "features.tsv").write_text(f"{TP53}\tTP53\tGene Expression\tchr17\t1\t2\n")
    draft_gene_table(tmp_path / "features.tsv", out, organism="human")
    assert out.read_text().splitlines()[1].startswith(f"{TP53}\tTP53")
