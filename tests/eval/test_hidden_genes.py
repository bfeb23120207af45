"""Hidden genes: a seeded draw of detected genes, and no input that holds a trace of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from eval.folds.baselines import (
    HiddenGenesConfig,
    baselines,
    choose_genes,
    factor_prediction,
    hide,
    with_representations,
    without_genes,
)
from eval.folds.fold import expression
from preprocessing.coexpression import fit_gene_factors
from preprocessing.tfidf import TfidfReweighter
from tests.eval.conftest import tfidf_by

CONFIG = HiddenGenesConfig(fraction=0.25)


@pytest.fixture(scope="module")
def weights(toy_fold):
    return TfidfReweighter().fit([slide.counts for slide in toy_fold.train])


def with_counts(slide, columns, values):
    counts = slide.counts.toarray()
    counts[:, columns] = values
    return replace(slide, counts=sparse.csr_matrix(counts))


def test_the_draw_is_seeded_bounded_and_among_detected_genes(toy_fold):
    rare = [with_counts(slide, np.arange(30), 0) for slide in toy_fold.train]
    found = choose_genes(rare, CONFIG)
    np.testing.assert_array_equal(found, choose_genes(rare, CONFIG))
    assert len(found) == int(0.25 * 30)
    assert found.min() >= 30
    assert (np.diff(found) > 0).all()
    assert len(choose_genes(toy_fold.train, replace(CONFIG, max_genes=4))) == 4
    assert len(choose_genes(toy_fold.train, replace(CONFIG, min_visible=55))) == 5
    other = choose_genes(rare, replace(CONFIG, seed=1))
    assert other.tolist() != found.tolist()


def test_a_cut_slide_is_one_that_never_measured_the_genes(toy_fold, weights):
    slide, columns = toy_fold.test[0], np.array([3, 17, 40])
    cut = without_genes(slide, columns, tfidf_by(weights))
    dense = slide.counts.toarray()
    dense[:, columns] = 0
    np.testing.assert_array_equal(cut.counts.toarray(), dense)
    assert cut.counts.dtype == slide.counts.dtype
    again = weights.transform(sparse.csr_matrix(dense)).toarray()
    np.testing.assert_array_equal(cut.tfidf.toarray(), again)
    length = np.linalg.norm(cut.tfidf.toarray(), axis=1)
    np.testing.assert_allclose(length, 1.0, rtol=1e-5)
    assert slide.counts[:, columns].nnz > 0


def test_no_input_changes_with_the_hidden_counts(toy_fold, weights):
    def representations(fold_test):
        hidden = hide(toy_fold.train, fold_test, toy_fold.genes, tfidf_by(weights), CONFIG)
        return hidden, baselines(hidden.train, hidden.test, toy_fold.factors)

    hidden, before = representations(toy_fold.test)
    columns = np.flatnonzero(np.isin(toy_fold.genes, hidden.names))
    other = tuple(with_counts(s, columns, 77) for s in toy_fold.test)
    changed, after = representations(other)
    assert changed.names == hidden.names
    for old, new in zip(before, after, strict=True):
        for slide in ("c1", "c2"):
            np.testing.assert_array_equal(old.omics[slide], new.omics[slide])
    assert not np.allclose(changed.truth["c1"], hidden.truth["c1"])


def test_truth_is_expression_with_all_genes(toy_fold, weights):
    hidden = hide(toy_fold.train, toy_fold.test, toy_fold.genes, tfidf_by(weights), CONFIG)
    columns = [toy_fold.genes.tolist().index(name) for name in hidden.names]
    for slide in toy_fold.test:
        expected = expression(slide)[:, columns].toarray()
        np.testing.assert_allclose(hidden.truth[slide.slide_id], expected, rtol=1e-6)
    assert f"{len(hidden.names)} of 60 genes hidden" in hidden.notes[0]


def test_whole_training_slides_are_taken_until_there_are_enough_spots(toy_fold, weights):
    few = replace(CONFIG, max_train_spots=150)
    hidden = hide(toy_fold.train, toy_fold.test, toy_fold.genes, tfidf_by(weights), few)
    assert [slide.n_spots for slide in hidden.train] == [120, 120]
    assert "2 of 3 training slides" in hidden.notes[1]
    assert set(hidden.truth) == {s.slide_id for s in (*hidden.train, *hidden.test)}


def test_where_no_gene_can_be_hidden_it_says_so(toy_fold, weights):
    small = replace(CONFIG, min_visible=60)
    hidden = hide((), toy_fold.test, toy_fold.genes, tfidf_by(weights), small)
    assert hidden.names == ()
    assert "none of 60 genes can be hidden" in hidden.notes[0]


def test_the_factor_model_recovers_genes_that_lie_on_its_factors(toy_fold):
    factors = toy_fold.factors
    score = np.random.default_rng(0).standard_normal((30, factors.rank))
    rows = score @ factors.components.T.astype(np.float64)
    columns = np.array([1, 9, 33])
    visible = rows.copy()
    visible[:, columns] = 0.0
    found = factor_prediction(sparse.csr_matrix(visible), factors, columns)
    np.testing.assert_allclose(found, rows[:, columns], atol=1e-6)
    turned = replace(factors, components=-factors.components)
    np.testing.assert_allclose(
        factor_prediction(sparse.csr_matrix(visible), turned, columns), found, atol=1e-8
    )


def test_intensities_are_hidden_in_the_same_way(toy_fold):
    def protein(slide):
        counts = slide.counts.astype(np.float32) * np.float32(1.5)
        return replace(slide, counts=counts, modality="protein")

    train, test = [protein(s) for s in toy_fold.train], [protein(s) for s in toy_fold.test]
    weights = TfidfReweighter("arcsinh").fit([slide.counts for slide in train])
    hidden = hide(train, test, toy_fold.genes, tfidf_by(weights), CONFIG)
    columns = np.flatnonzero(np.isin(toy_fold.genes, hidden.names))
    expected = np.arcsinh(test[0].counts.toarray()[:, columns] / 5)
    np.testing.assert_allclose(hidden.truth["c1"], expected, rtol=1e-5)
    assert hidden.test[0].counts[:, columns].nnz == 0
    factors = fit_gene_factors(lambda: iter([s.tfidf for s in hidden.train]), 60, 8)
    for model in baselines(hidden.train, hidden.test, factors):
        assert np.isfinite(model.omics["c1"]).all(), model.name


def stub(variant, omics, genes):
    """A checkpoint that embeds by counting calls, and remembers what it was asked to impute."""
    asked = []

    def impute(slide, names):
        asked.append(slide.slide_id)
        return np.zeros((slide.n_spots, len(names)))

    def encode_slide(slide):
        return SimpleNamespace(omics=np.ones((slide.n_spots, 3)), tower=np.ones((slide.n_spots, 5)))

    artifacts = SimpleNamespace(genes=genes)
    model = SimpleNamespace(
        omics=omics, artifacts=artifacts, impute=impute, encode_slide=encode_slide
    )
    return SimpleNamespace(
        variant=variant, model=model, role="model" if variant == "hibio" else "baseline"
    ), asked


def test_checkpoints_see_slides_without_the_genes_and_decode_test_slides_alone(
    toy_fold, weights, monkeypatch
):
    hidden = hide(toy_fold.train[:1], toy_fold.test, toy_fold.genes, tfidf_by(weights), CONFIG)
    slides = {s.slide_id: s for s in (*toy_fold.train, *toy_fold.test)}
    prepared = []

    def prepare_slide(path, artifacts, image, hidden):
        prepared.append((path, image, tuple(hidden)))
        return slides[path]

    monkeypatch.setattr("eval.folds.baselines.prepare_slide", prepare_slide)
    entries = [SimpleNamespace(slide_id=name, path=name) for name in slides]
    main, asked = stub("hibio", SimpleNamespace(encode=None), toy_fold.genes)
    blind, blind_asked = stub("mlp", SimpleNamespace(), toy_fold.genes)
    small, small_asked = stub("small", SimpleNamespace(encode=None), toy_fold.genes[:5])
    artifacts = SimpleNamespace(genes=toy_fold.genes, factors=toy_fold.factors)
    found = with_representations(
        hidden, [main, blind, small], entries, artifacts, with_baselines=True
    )
    assert prepared[:3] == [(name, None, hidden.names) for name in ("a1", "c1", "c2")]
    assert asked == ["c1", "c2"]
    assert blind_asked == small_asked == []
    assert set(found.decoded) == {"hibio_decoder", "lsa_decoder"}
    names = [model.name for model in found.models]
    assert names[:4] == ["hibio", "hibio_tower", "mlp", "small"]
    assert {"lsa", "pca_expression", "coordinates"} <= set(names)
    assert found.models[1].omics["c1"].shape == (120, 5)
    later = with_representations(hidden, [main], entries, artifacts, with_baselines=False)
    assert set(later.decoded) == {"hibio_decoder"}
    assert [model.name for model in later.models] == ["hibio", "hibio_tower"]
