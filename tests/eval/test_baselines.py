"""Baselines: what they are, and that nothing fitted in them sees a test slide."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

from eval.errors import FoldError
from eval.folds import baselines
from eval.folds.fold import Representation, SlideData, expression, variable_genes
from preprocessing.graphs import neighbour_mean
from tests.eval.conftest import N_SPOTS, TEST, TRAIN, make_fold


def slow_log_cp10k(counts: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def test_expression_equals_the_formula_of_its_modality_and_keeps_empty_spots(toy_fold):
    counts = toy_fold.train[0].counts.copy().tolil()
    counts[5] = 0
    slide = replace(toy_fold.train[0], counts=counts.tocsr())
    dense = slide.counts.toarray().astype(float)
    found = expression(slide).toarray()
    np.testing.assert_allclose(found, slow_log_cp10k(dense), rtol=1e-6)
    assert found.dtype == np.float64
    assert not found[5].any()
    protein = replace(slide, modality="protein", counts=slide.counts.astype(np.float32))
    np.testing.assert_allclose(expression(protein).toarray(), np.arcsinh(dense / 5), rtol=1e-6)


def test_variable_genes_are_those_of_largest_within_slide_variance(toy_fold):
    dense = [slow_log_cp10k(s.counts.toarray().astype(float)) for s in toy_fold.train]
    within = sum(((d - d.mean(axis=0)) ** 2).sum(axis=0) for d in dense)
    found = variable_genes(toy_fold.train, 7, min_detected=0.0)
    np.testing.assert_array_equal(found, np.argsort(-within)[:7])
    with pytest.raises(FoldError, match="no training slide"):
        variable_genes((), 7)


def test_rare_genes_come_last_and_depth_of_a_slide_chooses_nothing(toy_fold):
    counts = toy_fold.train[0].counts.toarray()
    counts[:, 3] = 0
    counts[0, 3] = 10_000
    rare = replace(toy_fold.train[0], counts=type(toy_fold.train[0].counts)(counts))
    assert variable_genes([rare], 60)[-1] == 3
    deep = [replace(s, counts=s.counts * (i + 1)) for i, s in enumerate(toy_fold.train)]
    np.testing.assert_array_equal(variable_genes(deep, 20), variable_genes(toy_fold.train, 20))


def test_every_row_is_there_with_every_slide(toy_fold):
    names = [model.name for model in toy_fold.models]
    assert names == [
        "hibio",
        "coordinates",
        "log_depth",
        "pca_expression",
        "pca_expression_neighbours",
        "niche_pca",
        "lsa",
        "lsa_neighbours",
        "raw_features",
    ]
    for model in toy_fold.models[1:]:
        assert not model.aligned
        for table in (model.image, model.omics):
            assert table is None or set(table) == {*TRAIN, *TEST}


def test_coordinates_and_features_are_standardised_per_slide(toy_fold):
    for name in ("coordinates", "raw_features"):
        for rows in toy_fold.model(name).image.values():
            np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-10)
            np.testing.assert_allclose(rows.std(axis=0), 1)


def test_neighbour_mean_equals_a_loop_and_a_lonely_spot_keeps_its_own():
    values = np.arange(8.0).reshape(4, 2)
    near = np.array([[1, 2], [0, -1], [3, 1], [-1, -1]])
    slow = np.stack([values[[1, 2]].mean(0), values[0], values[[3, 1]].mean(0), values[3]])
    np.testing.assert_allclose(neighbour_mean(values, near), slow)


def test_spot_vector_follows_the_method(toy_fold):
    slide, factors = toy_fold.test[0], toy_fold.factors
    raw = slide.tfidf @ factors.components
    own = (
        (raw - raw.mean(axis=0)) / raw.std(axis=0) * np.sqrt(factors.spread / factors.spread.max())
    )
    rows = toy_fold.model("lsa_neighbours").omics[slide.slide_id]
    np.testing.assert_allclose(rows[:, : own.shape[1]], own, atol=1e-5)
    beside = neighbour_mean(own, slide.neighbours)
    np.testing.assert_allclose(rows[:, own.shape[1] :], beside, atol=1e-5)
    np.testing.assert_array_equal(toy_fold.model("raw_features").omics[slide.slide_id], rows)


def test_pca_is_that_of_the_training_slides(toy_fold, monkeypatch):
    monkeypatch.setattr(baselines, "PCA_GENES", 20)
    monkeypatch.setattr(baselines, "PCA_COMPONENTS", 5)
    own = baselines.pca_expression(toy_fold.train, toy_fold.test)[0].omics["c1"]
    genes = variable_genes(toy_fold.train, 20)
    dense = [expression(s)[:, genes].toarray() for s in (*toy_fold.train, toy_fold.test[0])]
    projected = PCA(5).fit(np.concatenate(dense[:-1])).transform(dense[-1])
    cosine = np.einsum("sk,sk->k", projected - projected.mean(axis=0), own)
    norm = np.linalg.norm(projected - projected.mean(axis=0), axis=0) * np.linalg.norm(own, axis=0)
    np.testing.assert_allclose(np.abs(cosine) / norm, 1.0, atol=1e-3)


def test_niche_pca_keeps_the_distances_of_niches(toy_fold, monkeypatch):
    monkeypatch.setattr(baselines, "PCA_GENES", 12)
    slide = toy_fold.test[0]
    rows = baselines.niche_pca([slide], [slide]).omics[slide.slide_id]
    genes = variable_genes([slide], 12)
    dense = slide.counts.toarray()
    share = (dense / np.linalg.norm(dense, axis=1, keepdims=True))[:, genes]
    share = (share - share.mean(axis=0)) / share.std(axis=0)
    niche = np.stack(
        [share[[spot, *near[near >= 0]]].mean(axis=0) for spot, near in enumerate(slide.neighbours)]
    )
    np.testing.assert_allclose(pdist(rows), pdist(niche), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["pca_expression", "niche_pca", "lsa", "raw_features", "log_depth"]
)
def test_other_counts_on_one_test_slide_change_no_other_slide(toy_fold, name):
    changed = make_fold(changed="c2")
    before, after = toy_fold.model(name).omics, changed.model(name).omics
    assert not np.allclose(before["c2"], after["c2"])
    for slide in (*TRAIN, "c1"):
        np.testing.assert_array_equal(before[slide], after[slide])


def test_random_sets_are_fitted_on_training_slides_and_are_other_sets(toy_fold):
    assert tuple(toy_fold.random_sets.names) == tuple(toy_fold.anchors.names)
    apart = toy_fold.random_sets.matrix.multiply(toy_fold.anchors.matrix)
    assert apart.nnz == 0
    changed = make_fold(changed="c2").random_sets
    np.testing.assert_array_equal(changed.matrix.toarray(), toy_fold.random_sets.matrix.toarray())
    np.testing.assert_array_equal(changed.mean, toy_fold.random_sets.mean)


def test_slides_without_image_have_no_image_rows(toy_fold):
    blind = [replace(slide, has_image=False) for slide in toy_fold.test]
    row = baselines.coordinates([*toy_fold.train, *blind])
    assert set(row.image) == set(TRAIN)
    assert set(row.omics) == {*TRAIN, *TEST}
    with pytest.raises(FoldError, match="no stored features: \\['b1'\\]"):
        baselines.raw_features(toy_fold.train, {s: np.zeros((N_SPOTS, 2)) for s in ("a1", "a2")})


def test_a_fold_that_does_not_fit_together_is_refused(toy_fold):
    slide: SlideData = toy_fold.train[0]
    with pytest.raises(FoldError, match="same spots"):
        replace(slide, xy_um=slide.xy_um[:-1])
    with pytest.raises(FoldError, match="pad missing"):
        replace(slide, neighbours=slide.neighbours + N_SPOTS)
    with pytest.raises(FoldError, match="names the slide 'a1' twice"):
        replace(toy_fold, test=(slide,))
    with pytest.raises(FoldError, match="align the columns"):
        replace(toy_fold, genes=toy_fold.genes[:-1])
    with pytest.raises(FoldError, match="did you mean 'raw_features'"):
        toy_fold.model("raw_feature")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "has no image embedding"),
        ({}, "slide a1 is missing"),
        ({"a1": np.zeros((3, 2))}, r"shape \(3, 2\), expected \(120, D\)"),
        ({"a1": np.full((N_SPOTS, 2), np.nan)}, "120 rows that are not finite"),
    ],
)
def test_bad_embeddings_name_model_and_slide(toy_fold, table, message):
    with pytest.raises(FoldError, match=message):
        Representation("x", image=table).rows("image", toy_fold.train[:1])
