"""Fitting: vocabulary rules, no leak from held-out slides, every selector, variant and control."""

import dataclasses
import shutil
import typing

import numpy as np
import pytest
import torch
from scipy import sparse

from hibio.config.data import GenesConfig, PathwaysConfig, Selector, Tfidf
from hibio.config.files import ConfigError
from hibio.data.counts import CountBlocks
from hibio.data.fitting import TfidfStream, fit_artifacts, fit_vocabulary
from hibio.data.slide import prepare_slide
from hibio.encoders.base import OmicsContext
from hibio.encoders.genes import GeneGraphs
from preprocessing.errors import DataError
from preprocessing.selection import SELECTORS
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.tfidf import VARIANTS, TfidfReweighter
from tests.hibio.test_artifacts import assert_same
from tests.hibio.toy import (
    GENES,
    PATHWAYS,
    edit_store,
    keep_genes,
    make_model,
    make_protein,
    redraw_counts,
    rename_genes,
)


@pytest.fixture(scope="module")
def paths(toy_stores):
    return stores_in(toy_stores)


@pytest.fixture(scope="module")
def other_panel(paths, tmp_path_factory):
    """sim002 with the first 40 genes renamed."""
    with SlideStore(paths[1]) as store:
        names = [f"new{i}" if i < 40 else name for i, name in enumerate(store.gene_names)]
    target = tmp_path_factory.mktemp("panel") / "sim002.h5"
    return edit_store(paths[1], target, rename_genes(names))


def slow_vocabulary(paths, fraction: float, min_spots: int) -> list[str]:
    """Reference: count slides and spots of every gene with plain loops."""
    slides: dict[str, int] = {}
    spots: dict[str, int] = {}
    for path in paths:
        with SlideStore(path) as store:
            table = store.counts().toarray()
            for name, column in zip(store.gene_names, table.T, strict=True):
                slides[name] = slides.get(name, 0) + 1
                spots[name] = spots.get(name, 0) + sum(1 for count in column if count > 0)
    return sorted(g for g in slides if slides[g] / len(paths) >= fraction and spots[g] >= min_spots)


@pytest.mark.parametrize(("fraction", "min_spots"), [(1.0, 1), (0.5, 1), (0.5, 60), (1.0, 130)])
def test_vocabulary_against_plain_loops(paths, other_panel, fraction, min_spots):
    panel = [paths[0], other_panel]
    got = fit_vocabulary(panel, fraction, min_spots)
    assert got.tolist() == slow_vocabulary(panel, fraction, min_spots)
    with_new = any(name.startswith("new") for name in got)
    assert with_new == (fraction == 0.5)
    assert 50 < len(got) < 440 or (fraction, min_spots) == (0.5, 1)


def test_panels_that_hardly_overlap_are_an_error(paths, tmp_path):
    names = [f"Z{i}" for i in range(400)]
    path = edit_store(paths[1], tmp_path / "sim002.h5", rename_genes(names))
    with pytest.raises(ConfigError, match=r"only 0 of 800 genes .*min_slide_fraction"):
        fit_vocabulary([paths[0], path], 1.0, 10)


def test_a_gene_that_a_slide_did_not_measure_counts_as_zero(paths, other_panel):
    genes = fit_vocabulary([paths[0], other_panel], 0.5, 10)
    blocks = list(CountBlocks([paths[0], other_panel], genes))
    new = np.flatnonzero(np.char.startswith(genes.astype(str), "new"))
    assert len(new) > 30
    assert blocks[0][:, new].sum() == 0
    assert blocks[1][:, new].sum() > 0


def test_blocks_are_the_same_on_every_pass(paths, toy_artifacts):
    blocks = CountBlocks(paths[:2], toy_artifacts.genes)
    for first, second in zip(list(blocks), list(blocks), strict=True):
        assert (first != second).nnz == 0


def test_idf_is_of_the_training_slides(paths, toy_artifacts):
    stack = sparse.vstack(list(CountBlocks(paths[:2], toy_artifacts.genes)))
    df = np.asarray((stack > 0).sum(axis=0)).ravel()
    idf = np.log((1 + stack.shape[0]) / (1 + df)) + 1
    np.testing.assert_allclose(toy_artifacts.tfidf.idf, idf, rtol=1e-12)
    everything = TfidfReweighter().fit(CountBlocks(paths, toy_artifacts.genes))
    assert np.abs(everything.idf - idf).max() > 1e-3  # the held-out slide would change it
    assert toy_artifacts.train_slides == ("sim001", "sim002")


def test_nothing_of_a_held_out_slide_leaks(paths, toy_artifacts, tmp_path):
    """Other counts in the test store: artifacts identical to the bit; in a training store: not."""
    for path in paths:
        edit_store(path, tmp_path / path.name, redraw_counts if path == paths[2] else lambda _: 0)
    copies = stores_in(tmp_path)
    assert_same(fit_artifacts(copies[:2], GENES, PATHWAYS), toy_artifacts)
    edit_store(paths[1], copies[1], redraw_counts)
    changed = fit_artifacts(copies[:2], GENES, PATHWAYS)
    assert not np.array_equal(changed.factors.components, toy_artifacts.factors.components)
    assert not np.array_equal(changed.anchors.mean, toy_artifacts.anchors.mean)


@pytest.mark.parametrize("selector", ["hvg", "svg", "rank", "top", "random"])
def test_every_selector_gives_node_genes(paths, selector):
    genes = GenesConfig(**{**vars(GENES), "selector": selector})
    artifacts = fit_artifacts(paths[:2], genes, PATHWAYS)
    nodes = artifacts.node_genes
    assert len(set(nodes.tolist())) == 16
    assert 0 <= nodes.min() <= nodes.max() < artifacts.n_genes
    assert artifacts.settings.genes.selector == selector


def test_the_tfidf_selector_has_none(toy_artifacts):
    assert toy_artifacts.node_genes is None


@pytest.mark.parametrize("variant", ["raw", "bm25", "depth_matched", "spatial"])
def test_every_tfidf_variant_is_fitted_and_differs(paths, toy_artifacts, variant):
    genes = GenesConfig(**{**vars(GENES), "tfidf": variant})
    artifacts = fit_artifacts(paths[:2], genes, PATHWAYS)
    assert artifacts.tfidf.variant == variant
    counts = next(iter(CountBlocks(paths[:1], artifacts.genes)))
    ours, plain = (a.tfidf.transform(counts) for a in (artifacts, toy_artifacts))
    np.testing.assert_allclose(sparse.linalg.norm(ours, axis=1), 1.0, rtol=1e-5)
    assert abs(ours - plain).max() > 1e-3


def test_a_configuration_names_the_variants_and_selectors_that_there_are():
    assert typing.get_args(Tfidf) == tuple(VARIANTS)
    assert typing.get_args(Selector) == tuple(SELECTORS)


def test_an_unknown_variant_or_selector_names_the_nearest(paths):
    for name, value in (("tfidf", "bm52"), ("selector", "hgv")):
        genes = GenesConfig(**{**vars(GENES), name: value})
        with pytest.raises(ValueError, match="bm25" if name == "tfidf" else "hvg"):
            fit_artifacts(paths[:2], genes, PATHWAYS)


def test_matched_random_keeps_names_and_sizes_only(paths, toy_artifacts):
    pathways = PathwaysConfig(source="matched_random:default")
    random = fit_artifacts(paths[:2], GENES, pathways)
    assert random.anchors.names == toy_artifacts.anchors.names
    for name in random.anchors.names:
        real, drawn = (set(a.database.genes_of(name)) for a in (toy_artifacts, random))
        assert len(real) == len(drawn)
        assert not real & drawn
    assert_same(random.factors, toy_artifacts.factors)


def test_set_sizes_are_limited_and_the_settings_kept(paths, toy_artifacts):
    sizes = {n: len(toy_artifacts.database.genes_of(n)) for n in toy_artifacts.anchors.names}
    limit = sorted(sizes.values())[len(sizes) // 2]
    few = fit_artifacts(paths[:2], GENES, PathwaysConfig(min_genes=limit, max_genes=limit))
    assert set(few.anchors.names) == {name for name, size in sizes.items() if size == limit}
    assert few.settings.pathways.min_genes == limit


def test_the_sets_that_are_left_out_are_counted_and_told(paths, toy_artifacts, capsys):
    fit_artifacts(paths[:2], GENES, PATHWAYS)
    told = capsys.readouterr()
    assert f"{toy_artifacts.n_pathways} of 103 sets kept" in told.out + told.err


def test_target_genes_are_distinct_and_never_more_than_there_are(paths, toy_artifacts):
    assert len(set(toy_artifacts.target_genes.tolist())) == 30
    many = GenesConfig(**{**vars(GENES), "target_genes": 100_000})
    assert len(fit_artifacts(paths[:2], many, PATHWAYS).target_genes) == toy_artifacts.n_genes


def test_excluded_genes_are_left_out_by_name_and_by_pattern(paths):
    every = fit_vocabulary(paths, 1.0, 1)
    first = every[0]
    stem = every[5][:2]
    got = fit_vocabulary(paths, 1.0, 1, [first, f"{stem}*"])
    assert got.tolist() == [g for g in every if g != first and not g.startswith(stem)]
    assert len(got) < len(every) - 1
    with pytest.raises(ConfigError, match=r"'QQ\*' fits none of the 400 genes"):
        fit_vocabulary(paths, 1.0, 1, ["QQ*"])


def test_a_panel_of_three_genes_is_an_error(paths, tmp_path):
    def keep_three(file):
        keep_genes(file, 3)

    path = edit_store(paths[0], tmp_path / "sim001.h5", keep_three)
    with pytest.raises(ConfigError, match=r"only 3 of 3 genes .* 10 are needed"):
        fit_vocabulary([path], 1.0, 1)


def test_modalities_do_not_mix_and_intensities_need_their_own_weights(paths, tmp_path):
    protein = edit_store(paths[1], tmp_path / "sim002.h5", make_protein)
    with pytest.raises(ConfigError, match=r"different modality: rna .*protein \(sim002"):
        fit_artifacts([paths[0], protein], GENES, PATHWAYS)
    with pytest.raises(ConfigError, match=r"set genes.tfidf: arcsinh or rank"):
        fit_artifacts([protein], GENES, PATHWAYS)


@pytest.mark.parametrize("variant", ["arcsinh", "rank"])
def test_proteins_are_fitted_without_depth_and_without_pathways(paths, tmp_path, variant):
    protein = edit_store(paths[1], tmp_path / "sim002.h5", make_protein)
    genes = GenesConfig(**{**vars(GENES), "tfidf": variant, "graph_groups": 2})
    artifacts = fit_artifacts([protein], genes, PathwaysConfig(source="none"))
    assert artifacts.modality == "protein"
    assert artifacts.n_pathways == 0
    assert artifacts.database is None
    assert len(artifacts.gene_graphs) == artifacts.groups.n_groups == 2
    model = make_model(artifacts)
    slide = prepare_slide(protein, artifacts, None)
    embedded = model.encode_slide(slide)
    assert np.isfinite(embedded.omics).all()
    assert slide.expression.rows(np.arange(5)).target_SM.shape == (5, 0)
    with pytest.raises(ConfigError, match=r"modality rna, the model was trained on protein"):
        prepare_slide(paths[0], artifacts, None)


@pytest.mark.parametrize("change", [{}, {"graph_groups": 2, "selector": "svg"}, {"tfidf": "bm25"}])
def test_several_threads_fit_the_same_to_the_last_bit(paths, change):
    genes = GenesConfig(**{**vars(GENES), **change})
    alone = fit_artifacts(paths, genes, PATHWAYS)
    for threads in (2, 5):
        assert_same(fit_artifacts(paths, genes, PATHWAYS, threads=threads), alone)


def test_at_once_is_slide_by_slide(paths, toy_artifacts, tmp_path):
    """What is fitted on two slides is what one matrix of all their spots gives."""
    counts = CountBlocks(paths[:2], toy_artifacts.genes, threads=2)
    stack = sparse.vstack(list(counts))
    at_once = TfidfReweighter().fit(stack)
    assert np.array_equal(at_once.idf, toy_artifacts.tfidf.idf)  # whole numbers: to the last bit
    both = sparse.vstack(list(TfidfStream(counts, toy_artifacts.tfidf, GENES)())).toarray()
    _, singular, turned = np.linalg.svd(both.astype(np.float64), full_matrices=False)
    found = toy_artifacts.factors
    rank = found.rank
    np.testing.assert_allclose(found.singular_values, singular[1 : rank + 1], rtol=2e-3)
    cosine = np.linalg.svd(turned[1 : rank + 1] @ found.components)[1]
    assert cosine[: rank // 2].min() > 0.999  # the leading half of the space is the same


def test_a_store_that_vanishes_is_named_with_a_remedy(paths, toy_artifacts, tmp_path):
    for path in paths[:2]:
        shutil.copy(path, tmp_path)
    copies = stores_in(tmp_path)
    counts = CountBlocks(copies, toy_artifacts.genes, threads=2)
    copies[1].unlink()
    with pytest.raises(DataError, match=r"slide 'sim002' cannot be read from .*--resume"):
        list(counts)


def slow_values(paths, artifacts, asks_absent: bool) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation of what a gene is asked for, with plain loops."""
    keyword: dict[int, list[float]] = {}
    other: dict[int, list[float]] = {}
    for path in paths:
        with SlideStore(path) as store:
            names = store.gene_names.tolist()
            counts = store.counts()[:, [names.index(gene) for gene in artifacts.genes]]
        tfidf = artifacts.tfidf.transform(counts).toarray()
        for row in tfidf:
            own = set(np.argsort(-row, kind="stable")[:16].tolist())
            own = {gene for gene in own if row[gene] > 0}
            scale = sum(row[gene] for gene in own) / len(own)
            for gene, value in enumerate(row):
                (keyword if gene in own else other).setdefault(gene, []).append(value / scale)

    def moments(values: dict[int, list[float]]) -> dict[int, tuple[float, float]]:
        every = [one for ones in values.values() for one in ones]
        inside = sum(np.var(ones) * len(ones) for ones in values.values())
        pooled = inside / sum(len(ones) - 1 for ones in values.values())
        found = {}
        for gene in range(tfidf.shape[1]):
            ones = values.get(gene, [])
            n = len(ones) + 10
            mean = (sum(ones) + 10 * np.mean(every)) / n
            square = sum((one - np.mean(ones)) ** 2 for one in ones)
            found[gene] = (mean, (square + 10 * pooled) / n)
        return found

    asked, absent = moments(keyword), moments(other)
    result = {}
    for gene, (mean, variance) in asked.items():
        if asks_absent:
            far = mean - absent[gene][0]
            variance = (variance + absent[gene][1]) / 2 + far**2 / 4
            mean = (mean + absent[gene][0]) / 2
        result[gene] = (mean, variance**0.5)
    return result


@pytest.mark.parametrize("asks_absent", [False, True])
def test_scales_of_values_against_loops(paths, toy_artifacts, asks_absent):
    none = PathwaysConfig(source="none")
    scales = fit_artifacts(paths[:2], GENES, none, asks_absent=asks_absent).scales
    expected = slow_values(paths[:2], toy_artifacts, asks_absent)
    np.testing.assert_allclose(scales.mean, [expected[g][0] for g in range(400)], rtol=1e-3)
    np.testing.assert_allclose(scales.spread, [expected[g][1] for g in range(400)], rtol=1e-2)
    assert scales.use.sum() == 2 * 70 * 16
    assert (scales.spread > 0).all()


def test_edges_are_standardised_over_the_pairs_of_a_spot(toy_artifacts, toy_stores, capsys):
    """Their spread is 1 where it was measured; in older artifacts edges stay in nats."""
    slide = prepare_slide(toy_stores / "sim001.h5", toy_artifacts, None)
    gene = slide.expression.rows(np.arange(0, 70)).gene_SK
    context = OmicsContext.of(toy_artifacts)
    edge = GeneGraphs(context).pairs(torch.from_numpy(gene), torch.zeros(70, dtype=torch.long))
    others = edge[:, ~torch.eye(16, dtype=torch.bool)].view(70, 16, 15)
    spread = float(others.var(dim=2, correction=0).mean().sqrt())
    assert spread == pytest.approx(1.0, abs=0.15)  # of one of the two slides
    assert float((others > 0).float().mean()) == pytest.approx(
        toy_artifacts.scales.edge_share, abs=0.05
    )
    old = OmicsContext.of(dataclasses.replace(toy_artifacts, scales=None))
    assert np.array_equal(old.weight_TGE[0], toy_artifacts.gene_graphs[0].weight)


def test_the_fit_says_how_many_pairs_have_an_edge(paths, capsys):
    genes = dataclasses.replace(GENES, graph_edges=None)
    found = fit_artifacts(paths[:2], genes, PathwaysConfig(source="none"))
    told = capsys.readouterr().out
    n_used = int((found.scales.use > 0).sum())
    assert f"{found.scales.edge_share:.1%} of the pairs of a spot's keyword genes" in told
    assert f"at most {round(8 * n_used**0.5)} a gene, among {n_used} of 400" in told
    assert found.gene_graphs[0].neighbour.shape[1] == round(8 * n_used**0.5)
    unused = np.flatnonzero(found.scales.use == 0)
    assert (found.gene_graphs[0].neighbour[unused] == 400).all()


def test_values_of_older_artifacts_are_as_they_were(toy_artifacts):
    value, gene = torch.rand(3, 5), torch.randint(0, 400, (3, 5))
    old = make_model(dataclasses.replace(toy_artifacts, scales=None))
    assert torch.equal(old.standardised(value, gene), value)
    new = make_model(toy_artifacts).standardised(value, gene)
    scales = toy_artifacts.scales
    expected = (value.numpy() - scales.mean[gene]) / scales.spread[gene]
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-5)
