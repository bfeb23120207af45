"""Imputation: planted genes come back, noise predicts nothing, no held-out cell leaks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr

from eval.folds.baselines import HiddenGenesConfig, baselines, factor_prediction, hide
from eval.folds.fold import HiddenGenes, Representation
from eval.folds.spatial_blocks import BlocksConfig, block_splits
from eval.results import Question, ResultTable
from eval.tasks.imputation import ImputationConfig, relative_rmse, run
from preprocessing.tfidf import TfidfReweighter
from tests.eval.conftest import tfidf_by

CONFIG = ImputationConfig(blocks=BlocksConfig(4, 120.0), k=10)
METRICS = {"pearson/hidden_genes", "pearson_median/hidden_genes", "rmse/hidden_genes"}


def with_hidden(fold, train, test):
    """The fold with a fifth of its genes hidden, baselines, noise and the factor decoder."""
    weights = TfidfReweighter().fit([slide.counts for slide in fold.train])
    hidden = hide(train, test, fold.genes, tfidf_by(weights), HiddenGenesConfig(seed=1))
    slides = (*hidden.train, *hidden.test)
    rng = np.random.default_rng(2)
    noise = {s.slide_id: rng.standard_normal((s.n_spots, 6)) for s in slides}
    held_out = hidden.test if train else ()
    models = (
        Representation("noise", omics=noise),
        *baselines(hidden.train or hidden.test, held_out, fold.factors),
    )
    columns = np.flatnonzero(np.isin(fold.genes, hidden.names))
    decoded = {s.slide_id: factor_prediction(s.tfidf, fold.factors, columns) for s in hidden.test}
    hidden = replace(hidden, models=models, decoded={"lsa_decoder": decoded})
    return replace(fold, train=tuple(train), test=tuple(test), models=(), hidden=hidden)


@pytest.fixture(scope="module")
def patients(toy_fold):
    return with_hidden(toy_fold, toy_fold.train, toy_fold.test)


@pytest.fixture(scope="module")
def blocks(toy_fold):
    return replace(with_hidden(toy_fold, (), toy_fold.test[:1]), name="none")


@pytest.fixture(scope="module")
def result(patients):
    return run(patients, CONFIG)


def with_truth(fold, slide_id, change):
    truth = dict(fold.hidden.truth)
    truth[slide_id] = change(truth[slide_id].copy())
    return replace(fold, hidden=replace(fold.hidden, truth=truth))


def mean_of(result, model):
    return result.models[model]["pearson/hidden_genes"].mean


def test_planted_genes_come_back_and_noise_predicts_nothing(result):
    for model in ("lsa", "pca_expression", "knn", "lsa_decoder"):
        assert mean_of(result, model) > 0.25, model
    assert abs(mean_of(result, "noise")) < 0.1
    assert mean_of(result, "lsa") > mean_of(result, "coordinates") + 0.2
    assert result.models["lsa"]["pearson/hidden_genes"].keys == ["toy/0/c1", "toy/0/c2"]
    assert result.models["lsa"]["pearson/hidden_genes"].chance == 0.0


def test_the_gene_mean_has_no_correlation_and_an_error_of_about_one(result):
    row = result.models["gene_mean"]
    assert row["pearson/hidden_genes"].values == [0.0, 0.0]
    assert row["rmse/hidden_genes"].mean == pytest.approx(1.0, abs=0.15)
    assert result.models["lsa"]["rmse/hidden_genes"].mean < row["rmse/hidden_genes"].mean - 0.05
    assert set(row) == METRICS
    assert "a constant prediction has no correlation" in " ".join(result.notes)


def test_decoders_have_no_error_on_the_scale_of_the_truth(result):
    assert set(result.models["lsa_decoder"]) == METRICS - {"rmse/hidden_genes"}


def test_pearson_is_scipys_mean_over_genes(patients, result):
    for index, slide in enumerate(patients.hidden.test):
        truth = patients.hidden.truth[slide.slide_id]
        found = patients.hidden.decoded["lsa_decoder"][slide.slide_id]
        slow = [pearsonr(found[:, g], truth[:, g])[0] for g in range(truth.shape[1])]
        row = result.models["lsa_decoder"]
        assert row["pearson/hidden_genes"].values[index] == pytest.approx(np.mean(slow))
        assert row["pearson_median/hidden_genes"].values[index] == pytest.approx(np.median(slow))


def test_shuffled_training_expression_teaches_nothing(patients):
    fold = patients
    for number, name in enumerate(("a1", "a2", "b1")):
        rng = np.random.default_rng(number)
        fold = with_truth(fold, name, rng.permutation)
    after = run(fold, CONFIG)
    for model in ("lsa", "pca_expression", "knn"):
        assert abs(mean_of(after, model)) < 0.15, model


def test_one_test_slides_truth_changes_no_other_value(patients, result):
    after = run(with_truth(patients, "c2", lambda truth: truth[::-1]), CONFIG)
    for model, row in result.models.items():
        for name, metric in row.items():
            assert after.models[model][name].values[0] == metric.values[0]
    assert mean_of(after, "lsa") < mean_of(result, "lsa")


def test_constant_genes_are_left_out_and_counted(patients, result):
    def constant(truth):
        truth[:, 0] = 0.0
        return truth

    after = run(with_truth(patients, "c1", constant), CONFIG)
    assert "toy/0/c1: 1 genes are constant there and left out" in after.notes
    assert np.isfinite(mean_of(after, "lsa"))
    assert mean_of(after, "lsa") != mean_of(result, "lsa")


def test_without_training_slides_blocks_are_held_out(blocks):
    result = run(blocks, CONFIG)
    keys = [f"none/0/c1:block{number}" for number in range(4)]
    assert result.models["lsa"]["pearson/hidden_genes"].keys == keys
    assert mean_of(result, "lsa") > 0.25
    assert abs(mean_of(result, "noise")) < 0.15
    assert result.models["gene_mean"]["pearson/hidden_genes"].values == [0.0] * 4
    notes = " ".join(result.notes)
    assert "nothing is held out from pretraining" in notes
    assert "closer than 120 um" in notes


def test_expression_inside_the_buffer_does_not_reach_the_readout(blocks):
    slide = blocks.hidden.test[0]
    split = block_splits(slide, CONFIG.blocks, ResultTable(Question("x")))[2]
    inside = ~split.train & ~split.test

    def spoiled(truth):
        truth[inside] = 50.0
        return truth

    before, after = run(blocks, CONFIG), run(with_truth(blocks, "c1", spoiled), CONFIG)
    for model, row in before.models.items():
        for name, metric in row.items():
            assert after.models[model][name].values[2] == metric.values[2], (model, name)
    assert mean_of(after, "lsa") != mean_of(before, "lsa")


def test_large_training_sets_are_thinned_and_noted(patients):
    after = run(patients, replace(CONFIG, max_train_spots=180))
    assert "slide a1: 60 of 120 training cells are used" in after.notes
    assert mean_of(after, "lsa") > 0.2


def test_a_buffer_that_leaves_nothing_skips_the_block_and_says_so(blocks):
    result = run(blocks, replace(CONFIG, blocks=BlocksConfig(4, 5000.0)))
    assert result.models == {}
    assert any("block0: the buffer leaves less than two blocks" in n for n in result.notes)


def test_relative_error_in_closed_form():
    truth = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0]])
    predicted = np.array([[1.0, 1.0, 0.0], [1.0, 4.0, 0.0]])
    found = relative_rmse(predicted, truth, np.array([2.0, 3.0, 0.0]))
    assert found == pytest.approx((1.0 / 2.0 + np.sqrt(4.5) / 3.0) / 2)
    assert relative_rmse(truth, truth, np.ones(3)) == 0.0
    assert np.isnan(relative_rmse(predicted, truth, np.zeros(3)))


def test_without_hidden_genes_the_task_says_so(toy_fold):
    assert "no genes were hidden; not run" in run(toy_fold, CONFIG).notes[0]
    none = HiddenGenes((), (), (), {}, notes=("too few",))
    result = run(replace(toy_fold, hidden=none), CONFIG)
    assert result.models == {}
    assert result.notes[1] == "fold toy: too few"
