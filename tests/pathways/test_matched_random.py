"""Matched random sets: same sizes and expression bins, other genes, reproducible."""

import numpy as np
import pandas as pd
import pytest

from pathways import GeneSet, PathwayDatabase, PathwayError, matched_random

N_GENES = 400
GENES = [f"G{i}" for i in range(N_GENES)]
EXPRESSION = np.random.default_rng(0).permutation(np.geomspace(1e-3, 50, N_GENES))


def _database(n_sets: int = 12) -> PathwayDatabase:
    rng = np.random.default_rng(1)
    high = np.argsort(-EXPRESSION)
    sets = [
        GeneSet(f"S{i}", "real", tuple(GENES[g] for g in rng.choice(high[:200], 10, replace=False)))
        for i in range(n_sets)
    ]
    table = PathwayDatabase.from_sets(sets, "real").table
    return PathwayDatabase("real", table.assign(weight=rng.normal(size=len(table))))


def _bins(genes: pd.Series) -> np.ndarray:
    rank = pd.Series(EXPRESSION, index=GENES).rank().to_numpy() - 1
    return pd.Series(rank * 20 // N_GENES, index=GENES)[genes].to_numpy()


def test_size_weights_and_bins_stay_and_genes_change() -> None:
    real = _database()
    control = matched_random(real, GENES, EXPRESSION, seed=0)
    assert control.name == "matched_random:real"
    assert control.names == real.names
    for column in ("source", "weight"):
        pd.testing.assert_series_equal(control.table[column], real.table[column])
    np.testing.assert_array_equal(_bins(control.table["target"]), _bins(real.table["target"]))
    for name in real.names:
        drawn = control.genes_of(name)
        assert len(set(drawn)) == len(drawn)
        assert not set(drawn) & set(real.genes_of(name))


def test_seed_and_name_decide_not_the_company() -> None:
    real = _database()
    first = matched_random(real, GENES, EXPRESSION, seed=0)
    assert first.sha256 == matched_random(real, GENES, EXPRESSION, seed=0).sha256
    assert first.sha256 != matched_random(real, GENES, EXPRESSION, seed=1).sha256
    rows = real.table["source"].isin(["S3", "S5"])
    few = matched_random(PathwayDatabase("few", real.table[rows]), GENES, EXPRESSION, seed=0)
    assert few.genes_of("S5") == first.genes_of("S5")


def test_every_gene_of_a_bin_is_drawn_equally_often() -> None:
    bin_genes = [GENES[g] for g in np.argsort(EXPRESSION)[-20:]]
    sets = [GeneSet(f"S{i}", "", (bin_genes[0],)) for i in range(1900)]
    control = matched_random(PathwayDatabase.from_sets(sets, "many"), GENES, EXPRESSION, seed=0)
    counts = control.table["target"].value_counts().reindex(bin_genes, fill_value=0)
    assert counts.sum() == 1900
    assert counts[bin_genes[0]] == 0
    chi_square = ((counts.iloc[1:] - 100) ** 2 / 100).sum()
    assert chi_square < 45  # beyond the 99.9 % point of 18 degrees of freedom


def test_full_bins_and_full_panels_still_give_the_size() -> None:
    order = np.argsort(EXPRESSION)
    whole_bin = GeneSet("bin", "", tuple(GENES[g] for g in order[:20]))
    most = GeneSet("most", "", tuple(GENES[g] for g in order[:300]))
    database = PathwayDatabase.from_sets([whole_bin, most], "wide")
    control = matched_random(database, GENES, EXPRESSION, seed=0)
    near = set(control.genes_of("bin"))
    assert near == {GENES[g] for g in order[20:40]}  # the nearest free genes
    drawn = control.genes_of("most")
    assert len(set(drawn)) == 300
    assert {GENES[g] for g in order[300:]} <= set(drawn)  # no own gene before all others are used


def test_errors() -> None:
    with pytest.raises(PathwayError, match="mean_expression of shape"):
        matched_random(_database(), GENES, EXPRESSION[:-1], seed=0)
    with pytest.raises(PathwayError, match="restrict"):
        matched_random(_database(), GENES[:50], EXPRESSION[:50], seed=0)
