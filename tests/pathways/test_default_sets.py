"""The embedded database keeps its promises: sizes, symbols, uniqueness, little overlap."""

import csv
import gzip
import re
from pathlib import Path

import pytest

from pathways import PathwayDatabase, load_pathways

GENE_TABLE = Path(__file__).parents[3] / "shared" / "data" / "gene_tables" / "grch38.tsv.gz"


@pytest.fixture(scope="module")
def default() -> PathwayDatabase:
    return load_pathways("default")


def test_number_and_sizes(default: PathwayDatabase) -> None:
    assert len(default.names) >= 56
    sizes = default.table.groupby("source").size()
    assert sizes.between(10, 60).all(), sizes[~sizes.between(10, 60)].to_dict()


def test_names_symbols_and_descriptions(default: PathwayDatabase) -> None:
    for name in default.names:
        assert re.fullmatch(r"[A-Z0-9_]+", name)
        genes = default.genes_of(name)
        assert len(set(genes)) == len(genes)
        assert 10 < len(default.descriptions[name]) < 90
    for gene in default.genes:
        assert re.fullmatch(r"[A-Z][A-Z0-9-]+|AR|C[2-7]|F\d+|T[FH]", gene), gene
    assert len(set(default.descriptions.values())) == len(default.names)


def test_enough_sets_have_genes_of_their_own(default: PathwayDatabase) -> None:
    counts = default.table["target"].value_counts()
    own = default.table[default.table["target"].map(counts) == 1].groupby("source").size()
    assert (own >= 8).sum() >= 48  # the simulator plants 24 of them
    assert default.overlap().max < 0.2


def test_symbols_are_in_the_gene_table(default: PathwayDatabase) -> None:
    if not GENE_TABLE.is_file():
        pytest.skip(f"no gene table at {GENE_TABLE}")
    with gzip.open(GENE_TABLE, "rt") as stream:
        known = {row["symbol"] for row in csv.DictReader(stream, delimiter="\t")}
    missing = sorted(set(default.genes) - known)
    assert len(missing) <= 0.03 * len(default.genes), missing
