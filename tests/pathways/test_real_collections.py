"""Published collections load, and restrict to real panels (skipped where the data are absent)."""

import gzip
from pathlib import Path

import pytest

from pathways import PathwayError, load_pathways
from pathways import catalog as recipes

DATA = Path(__file__).parents[3] / "shared" / "data"
SETS = DATA / "genesets"

needs_data = pytest.mark.skipif(not SETS.is_dir(), reason=f"no gene sets at {SETS}")


@needs_data
@pytest.mark.parametrize(
    ("file", "n_sets", "kind"),
    [
        ("h.all.v7.0.symbols.gmt", 50, "symbol"),
        ("c2.cp.reactome.v7.0.symbols.gmt", 1499, "symbol"),
        ("enrichr.GO_Biological_Process_2021.gmt", 6036, "symbol"),
        ("mouse.reactome.entrez.gmt", 1457, "entrez"),
        ("mouse.reactome.symbols.derived.gmt", 1457, "mouse_symbol"),
    ],
)
def test_sizes_and_identifiers(file: str, n_sets: int, kind: str) -> None:
    database = load_pathways(file, root=SETS)
    assert len(database.names) == n_sets
    assert database.id_type == kind


@needs_data
def test_names_with_spaces_stay_whole() -> None:
    names = load_pathways("enrichr.GO_Biological_Process_2021.gmt", root=SETS).names
    assert "'de novo' posttranslational protein folding (GO:0051084)" in names


@needs_data
def test_hallmark_and_default_fit_a_breast_section() -> None:
    counts = DATA / "her2st" / "counts" / "A1.tsv.gz"
    if not counts.is_file():
        pytest.skip(f"no section at {counts}")
    with gzip.open(counts, "rt") as stream:
        panel = stream.readline().rstrip("\n").split("\t")[1:]
    _, report = load_pathways("h.all.v7.0.symbols.gmt", root=SETS).restrict(panel)
    assert report.n_kept == 50
    assert report.n_genes > 4_000
    assert report.n_matched > 0.8 * report.n_genes
    default, report = load_pathways("default").restrict(panel)
    assert report.n_kept >= 90
    assert default.matrix(panel).shape == (len(panel), report.n_kept)
    with pytest.raises(PathwayError, match="human collection"):
        load_pathways("hallmark_mouse_orthologs.derived.gmt", root=SETS).restrict(panel)


@needs_data
@pytest.mark.parametrize(
    ("name", "n_sets"),
    [("hallmark", 50), ("reactome", 1499)],
)
def test_recipes_accept_the_published_bytes(
    name: str, n_sets: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(recipes.CACHE_VARIABLE, str(tmp_path))
    source = SETS / recipes.read_recipes()[name].filename
    recipes.fetch(name, download=lambda url: source.read_bytes())
    assert len(load_pathways(name).names) == n_sets
