"""Our gene sets in decoupler, and its scores beside ours (read by its own rules where missing)."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr

from hibio.cli import main
from pathways import GeneSet, PathwayDatabase, PathwayError, fit_anchors, load_pathways
from preprocessing.tfidf import TfidfReweighter


def split_at_blanks(path: Path) -> dict[str, list[str]]:
    """Sets as decoupler 2 reads a line: fields between blanks, the second one left out."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {fields[0]: fields[2:] for fields in lines}


@pytest.mark.parametrize("with_decoupler", [False, True], ids=["its rule", "decoupler"])
def test_exported_sets_have_their_genes_and_nothing_else(with_decoupler: bool, tmp_path: Path):
    path = tmp_path / "sets.gmt"
    assert main(["pathways", "export", "default", "--out", str(path)]) == 0
    database = load_pathways("default")
    if with_decoupler:
        decoupler = pytest.importorskip("decoupler", reason="decoupler is not installed")
        net = decoupler.pp.read_gmt(str(path))
        pd.testing.assert_frame_equal(net, database.table[["source", "target"]].astype(net.dtypes))
    else:
        assert split_at_blanks(path) == {n: list(database.genes_of(n)) for n in database.names}
    again = load_pathways(str(path))
    assert again.sha256 == database.sha256
    told = {name: text.replace(" ", "_") for name, text in database.descriptions.items()}
    assert again.descriptions == told  # no word is lost
    assert main(["pathways", "export", "default", "--out", str(path)]) == 1  # it is there


def test_odd_sets_are_told_or_refused():
    sets = [GeneSet("Cell cycle", "", ("A", "B")), GeneSet("N", "a  b", ("A",))]
    plain = PathwayDatabase.from_sets(sets, "toy").plain_sets()
    assert [(one.name, one.description) for one in plain] == [("Cell_cycle", "na"), ("N", "a_b")]
    with pytest.raises(PathwayError, match="has weights, which GMT cannot hold"):
        PathwayDatabase.from_sets(sets, "toy", weights={("N", "A"): 2.0}).plain_sets()
    with pytest.raises(PathwayError, match="genes with blanks: HLA A"):
        PathwayDatabase.from_sets([GeneSet("N", "", ("HLA A",))], "toy").plain_sets()


def test_decoupler_ranks_spots_as_we_do_where_a_set_is_planted():
    decoupler = pytest.importorskip("decoupler", reason="decoupler is not installed")
    database = load_pathways("default")
    genes = list(database.genes)
    rng = np.random.default_rng(0)
    planted = ["HYPOXIA", "T_CELL", "ESTROGEN_RECEPTOR"]
    activity = rng.gamma(2.0, size=(150, len(planted)))
    rate = np.tile(rng.gamma(0.5, 1.0, len(genes)), (150, 1))
    for column, name in enumerate(planted):
        rate[:, np.isin(genes, database.genes_of(name))] *= activity[:, [column]]
    counts = csr_matrix(rng.poisson(rate))
    weights = TfidfReweighter().fit(counts)
    tfidf = weights.transform(counts)
    ours = fit_anchors(database, genes, weights.idf, [tfidf]).match(tfidf)
    frame = pd.DataFrame(np.log1p(counts.toarray()), columns=genes)
    for method in ("ulm", "aucell"):
        found = getattr(decoupler.mt, method)(frame, database.table, verbose=False)
        theirs = found[0] if isinstance(found, tuple) else found
        for column, name in enumerate(planted):
            own = ours[:, database.names.index(name)]
            beside = spearmanr(own, theirs[name]).statistic
            truth = [spearmanr(activity[:, column], one).statistic for one in (own, theirs[name])]
            print(f"{method} {name}: {beside:.2f}; ours, theirs and what was planted:", *truth)
            assert beside > 0.6
