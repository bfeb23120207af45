"""PathwayDatabase: checks, restriction with its report, matrix, hash and overlap."""

import itertools

import numpy as np
import pandas as pd
import pytest

from pathways import GeneSet, PathwayDatabase, PathwayError

SETS = [
    GeneSet("BIG", "nine genes", tuple(f"G{i}" for i in range(9))),
    GeneSet("MID", "five genes", tuple(f"G{i}" for i in range(6, 11))),
    GeneSet("SMALL", "two genes", ("G1", "X1")),
]


def _database() -> PathwayDatabase:
    return PathwayDatabase.from_sets(SETS, "toy", organism="human", licence="CC0", version="3")


def test_names_genes_and_members_keep_file_order() -> None:
    database = _database()
    assert database.names == ("BIG", "MID", "SMALL")
    assert database.genes_of("MID") == ("G6", "G7", "G8", "G9", "G10")
    assert database.genes[-1] == "X1"
    assert len(database.genes) == 12
    assert database.descriptions["SMALL"] == "two genes"
    assert database.id_type == "symbol"
    with pytest.raises(PathwayError, match=r"nearest.*SMALL"):
        database.genes_of("SMAL")


def test_restrict_counts_what_it_keeps_and_drops() -> None:
    panel = ["Z", *(f"G{i}" for i in range(11))]
    small, report = _database().restrict(panel, min_genes=2, max_genes=8)
    assert small.names == ("MID",)
    assert small.licence == "CC0"
    assert small.descriptions == {"MID": "five genes"}
    assert (report.n_sets, report.n_kept, report.n_too_small, report.n_too_large) == (3, 1, 1, 1)
    assert (report.n_genes, report.n_matched, report.n_panel) == (12, 11, 12)
    assert report.table["status"].tolist() == ["too_large", "kept", "too_small"]
    assert report.table["n_matched"].tolist() == [9, 5, 1]
    assert report.table["coverage"].tolist() == [1.0, 1.0, 0.5]
    assert "1 of 3 sets kept (1 too small, 1 too large); 11 of 12 genes" in str(report)


def test_restrict_keeps_only_panel_genes_and_leaves_the_original() -> None:
    database = _database()
    before = database.table.copy()
    small, _ = database.restrict(["G7", "G8", "G1", "G0"], min_genes=2)
    assert small.genes_of("MID") == ("G7", "G8")
    assert small.genes_of("BIG") == ("G0", "G1", "G7", "G8")
    assert small.sha256 != database.sha256
    pd.testing.assert_frame_equal(database.table, before)


@pytest.mark.parametrize(
    ("sets", "panel", "words"),
    [
        (["TP53", "ACTB"], ["ENSG00000141510", "ENSG00000075624"], ["Ensembl", "TP53", "ENSG0000"]),
        (["TP53", "ACTB"], ["Trp53", "Actb"], ["mouse", "ortholog"]),
        (["Trp53", "Actb"], ["TP53", "ACTB"], ["use a human collection"]),
        (["ENSG00000141510"], ["ENSG00000141510.16"], ["strip_versions"]),
        (["ENSG00000141510"], ["ENSMUSG00000059552"], ["use a mouse collection"]),
        (["TP53", "ACTB"], ["ENSMUSG00000059552.1"], ["use a mouse collection"]),
        (["7157", "60"], ["TP53", "ACTB"], ["Entrez"]),
        (["TP53", "12 %", "~"], ["tp53", "x y", "!"], ["upper and lower case"]),
        (["TP53"], ["EGFR"], ["No common form"]),
    ],
)
def test_mismatch_is_diagnosed_with_examples(
    sets: list[str], panel: list[str], words: list[str]
) -> None:
    database = PathwayDatabase.from_sets([GeneSet("A", "", tuple(sets))], "mine")
    with pytest.raises(PathwayError) as caught:
        database.restrict(panel, min_genes=1)
    for word in ["mine", f"0 of {len(sets)}", panel[0], sets[0], *words]:
        assert word in str(caught.value)


def test_two_lucky_matches_are_still_a_mismatch() -> None:
    mouse = [f"Gene{i}" for i in range(300)]
    human = [f"GENE{i}" for i in range(300)]
    database = PathwayDatabase.from_sets([GeneSet("A", "", (*human, "C3", "F3"))], "human")
    with pytest.raises(PathwayError, match=r"2 of 302 set genes.*mouse"):
        database.restrict([*mouse, "C3", "F3"], min_genes=1)


def test_a_small_panel_inside_a_large_database_is_fine() -> None:
    large = [GeneSet(f"S{i}", "", tuple(f"G{i}X{j}" for j in range(10))) for i in range(500)]
    database = PathwayDatabase.from_sets(large, "large")
    small, report = database.restrict([f"G7X{j}" for j in range(10)])
    assert small.names == ("S7",)
    assert report.n_too_small == 499


def test_no_set_of_the_right_size() -> None:
    with pytest.raises(PathwayError, match=r"none of 3 sets has 20 to 30 genes.*largest has 9"):
        _database().restrict([f"G{i}" for i in range(11)], min_genes=20, max_genes=30)
    with pytest.raises(PathwayError, match="1 <= min_genes <= max_genes"):
        _database().restrict(["G1"], min_genes=3, max_genes=2)
    with pytest.raises(PathwayError, match="twice: G1"):
        _database().restrict(["G1", "G1"])
    with pytest.raises(PathwayError, match="no genes"):
        _database().restrict([])


def test_matrix_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(30)]
    pairs = rng.choice(40 * 6, size=90, replace=False)
    table = pd.DataFrame(
        {
            "source": [f"P{p % 6}" for p in pairs],
            "target": [f"G{p // 6}" for p in pairs],
            "weight": rng.normal(size=90),
        }
    )
    database = PathwayDatabase("signed", table)
    matrix = database.matrix(genes)
    slow = np.zeros((30, 6))
    for source, target, weight in table.itertuples(index=False):
        if target in genes:
            slow[genes.index(target), database.names.index(source)] = weight
    np.testing.assert_allclose(matrix.toarray(), slow, rtol=1e-6)
    order = rng.permutation(30)
    shuffled = database.matrix([genes[i] for i in order])
    np.testing.assert_array_equal(shuffled.toarray(), matrix.toarray()[order])


def test_hash_ignores_row_order_and_sees_every_change() -> None:
    database = _database()
    shuffled = PathwayDatabase("other", database.table.sample(frac=1, random_state=1))
    assert shuffled.sha256 == database.sha256
    changed = database.table.copy()
    changed.loc[0, "weight"] = 2.0
    assert PathwayDatabase("toy", changed).sha256 != database.sha256


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": [1.0, np.nan]}, "1 row.*weight.*table row 2"),
        ({"weight": [0.0, 1.0]}, "weight"),
        ({"weight": ["1", "many"]}, "weight"),
        ({"target": ["G1", "G1"]}, "earlier row"),
        ({"target": ["G1", ""]}, "empty or padded target"),
        ({"source": ["A", None]}, "empty or padded source"),
        ({"target": ["G1", ["G2"]]}, r"1 row.*padded target.*table row 2.*\['G2'\]"),
    ],
)
def test_wrong_tables_are_refused(change: dict[str, list[object]], word: str) -> None:
    good = {"source": ["A", "A"], "target": ["G1", "G2"], "weight": [1.0, 1.0]}
    assert PathwayDatabase("good", pd.DataFrame(good)).names == ("A",)
    with pytest.raises(PathwayError, match=word):
        PathwayDatabase("bad", pd.DataFrame(good | change))
    with pytest.raises(PathwayError, match=r"weight.* missing"):
        PathwayDatabase("bad", pd.DataFrame(good)[["source", "target"]])


def test_overlap_against_all_pairs() -> None:
    rng = np.random.default_rng(1)
    sets = [
        GeneSet(f"S{i}", "", tuple(f"G{g}" for g in rng.choice(20, size=size, replace=False)))
        for i, size in enumerate([3, 8, 12, 5, 20])
    ]
    report = PathwayDatabase.from_sets(sets, "toy").overlap(n_top=3)
    slow = {
        (a.name, b.name): len(set(a.genes) & set(b.genes)) / len(set(a.genes) | set(b.genes))
        for a, b in itertools.combinations(sets, 2)
    }
    assert report.mean == pytest.approx(np.mean(list(slow.values())))
    assert report.max == pytest.approx(max(slow.values()))
    assert [v for *_, v in report.top] == pytest.approx(sorted(slow.values(), reverse=True)[:3])
    for first, second, value in report.top:
        assert slow[first, second] == pytest.approx(value)


def test_overlap_of_one_set_and_of_equal_sets() -> None:
    one = PathwayDatabase.from_sets(SETS[:1], "one").overlap()
    assert (one.max, one.mean, one.top) == (0.0, 0.0, ())
    twins = [GeneSet("A", "", ("X", "Y")), GeneSet("B", "", ("Y", "X"))]
    assert PathwayDatabase.from_sets(twins, "twins").overlap().max == 1.0
