"""Expression prediction: planted signal is found, independence is at zero, nothing leaks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.linear_model import LinearRegression, Ridge

from eval.errors import FoldError
from eval.folds.fold import expression as measured
from eval.folds.fold import variable_genes
from eval.measures.metrics import pearson_per_gene
from eval.measures.ridge import RidgeConfig, ridge_fit_predict
from eval.settings import find_task
from eval.tasks import TASKS
from eval.tasks.expression import ExpressionConfig, decode, run
from tests.eval.conftest import make_fold

CONFIG = ExpressionConfig(n_genes=(10, 30))
READOUTS = ("", "_hest", "_bleep", "_both", "_combined", "_via_omics")


@pytest.fixture(scope="module")
def result(toy_fold):
    return run(toy_fold, CONFIG)


def test_planted_signal_is_predicted_by_every_readout(result):
    row = result.models["hibio"]
    for readout in READOUTS:
        for targets in ("top10_hvg", "top30_hvg"):
            metric = row[f"pearson{readout}/{targets}"]
            assert metric.mean > 0.3, (readout, targets)
            assert metric.keys == ["toy/0/c1", "toy/0/c2"]
            assert row[f"pearson{readout}_pooled/{targets}"].keys == ["toy/0/pooled"]
    best = row["pearson_combined/top10_hvg"].mean
    assert any(
        n.startswith("combined, fold toy/0/hibio, top10_hvg: weights 0") for n in result.notes
    )
    assert best > result.models["raw_features"]["pearson/top10_hvg"].mean
    assert best > result.models["coordinates"]["pearson/top10_hvg"].mean + 0.2


def test_independent_images_predict_nothing(null_fold):
    models = run(null_fold, CONFIG).models
    for name in ("hibio", "raw_features", "coordinates"):
        for metric, found in models[name].items():
            assert abs(found.mean) < 0.13, (name, metric)


def test_references_are_zero_for_the_mean_and_high_for_the_neighbours(result):
    assert result.models["mean"]["pearson/top10_hvg"].values == [0.0, 0.0]
    assert result.models["mean"]["pearson_pooled/top10_hvg"].values == [0.0]
    assert result.models["neighbour_oracle"]["pearson/top10_hvg"].mean > 0.3
    notes = " ".join(result.notes)
    assert "constant prediction" in notes
    assert "reference that sees the test counts" in notes


def test_hest_readout_equals_scikit_learn_step_by_step(toy_fold, result):
    genes = variable_genes(toy_fold.train, 10)

    def standardised(slide):
        rows = toy_fold.model("hibio").image[slide.slide_id]
        return (rows - rows.mean(axis=0)) / rows.std(axis=0)

    def expression(slide):
        return measured(slide)[:, genes].toarray()

    train_x = np.concatenate([standardised(s) for s in toy_fold.train])
    train_y = np.concatenate([expression(s) for s in toy_fold.train])
    model = Ridge(alpha=100 / (8 * 10)).fit(train_x, train_y)
    for index, slide in enumerate(toy_fold.test):
        predicted, truth = model.predict(standardised(slide)), expression(slide)
        slow = np.mean([pearsonr(predicted[:, g], truth[:, g])[0] for g in range(10)])
        found = result.models["hibio"]["pearson_hest/top10_hvg"].values[index]
        assert found == pytest.approx(slow)


def test_other_test_counts_change_neither_targets_nor_the_other_slide(toy_fold, result):
    changed = make_fold(changed="c2")
    config = replace(CONFIG, n_genes=(10,))
    after = run(changed, config).models["hibio"]["pearson/top10_hvg"]
    before = result.models["hibio"]["pearson/top10_hvg"]
    assert after.values[0] == before.values[0]
    assert after.values[1] != before.values[1]
    np.testing.assert_array_equal(
        variable_genes(changed.train, 10), variable_genes(toy_fold.train, 10)
    )


def test_constant_genes_are_left_out_and_counted(toy_fold):
    gene = variable_genes(toy_fold.train, 1)[0]
    counts = toy_fold.test[0].counts.toarray()
    counts[:, gene] = 0
    slide = replace(toy_fold.test[0], counts=type(toy_fold.test[0].counts)(counts))
    result = run(replace(toy_fold, test=(slide,)), replace(CONFIG, n_genes=(1, 10)))
    assert "top10_hvg: 1 genes are constant on test slide c1 (fold toy)" in " ".join(result.notes)
    assert result.models["hibio"]["pearson/top1_hvg"].n == 0
    assert result.models["hibio"]["pearson/top10_hvg"].mean > 0.3


def test_raw_features_get_the_combined_readout_as_a_control_but_not_twice(toy_fold, result):
    row = result.models["raw_features"]
    assert "pearson_combined/top10_hvg" in row
    assert "pearson_both/top10_hvg" not in row
    alone = replace(toy_fold, models=tuple(m for m in toy_fold.models if m.name == "hibio"))
    lonely = run(alone, CONFIG)
    assert "pearson_both/top10_hvg" not in lonely.models["hibio"]
    assert any("left out" in note for note in lonely.notes)


def test_through_the_spot_vector_equals_two_regressions_step_by_step(toy_fold, result):
    genes = variable_genes(toy_fold.train, 10)
    raw, own = toy_fold.model("raw_features"), toy_fold.model("hibio")

    def image(slide):
        sides = [model.image[slide.slide_id] for model in (raw, own)]
        return np.hstack([(x - x.mean(axis=0)) / x.std(axis=0) for x in sides])

    sides = [raw.omics[s.slide_id] for s in toy_fold.train]
    vector = np.concatenate([side - side.mean(axis=0) for side in sides])
    level = [measured(s)[:, genes].toarray() for s in toy_fold.train]
    counts = np.concatenate([(y - y.mean(axis=0)) / y.std(axis=0) for y in level])
    slides = np.concatenate([[s.slide_id] * s.n_spots for s in toy_fold.train])
    train_x = np.concatenate([image(s) for s in toy_fold.train])
    decoder = LinearRegression().fit(vector, counts)
    for index, slide in enumerate(toy_fold.test):
        seen = ridge_fit_predict(train_x, vector, image(slide), "cv", slides, slides)
        predicted, truth = decoder.predict(seen), measured(slide)[:, genes].toarray()
        slow = np.mean([pearsonr(predicted[:, g], truth[:, g])[0] for g in range(10)])
        found = result.models["hibio"]["pearson_via_omics/top10_hvg"].values[index]
        assert found == pytest.approx(slow, abs=1e-6)


def test_many_noisy_genes_are_read_better_through_few_shared_axes():
    rng = np.random.default_rng(0)
    image, axes = rng.standard_normal((400, 60)), rng.standard_normal((3, 50))
    vector = image[:, :3] + 0.5 * rng.standard_normal((400, 3))
    counts = vector @ axes + 8.0 * rng.standard_normal((400, 50))
    train, test = slice(0, 100), slice(100, 400)
    direct = Ridge(alpha=1.0).fit(image[train], counts[train]).predict(image[test])
    seen = Ridge(alpha=1.0).fit(image[train], vector[train]).predict(image[test])
    through = decode(vector[train], counts[train], seen)
    score = [np.mean(pearson_per_gene(p, counts[test])) for p in (direct, through)]
    assert score[1] > 1.5 * score[0] > 0


def test_without_a_spot_vector_the_readout_through_it_is_left_out(toy_fold):
    models = tuple(
        replace(m, omics=None) if m.name == "raw_features" else m for m in toy_fold.models
    )
    found = run(replace(toy_fold, models=models), CONFIG)
    assert "pearson_both/top10_hvg" in found.models["hibio"]
    assert "pearson_via_omics/top10_hvg" not in found.models["hibio"]
    assert any("'via_omics' is left out" in note for note in found.notes)


def test_a_niche_is_the_embedding_beside_its_neighbours_mean_and_beats_random_spots(toy_fold):
    rng, own = np.random.default_rng(3), toy_fold.model("hibio")
    noisy = {n: x + 2.0 * rng.standard_normal(x.shape) for n, x in own.image.items()}
    models = (replace(own, image=noisy), toy_fold.model("raw_features"))
    fold, config = replace(toy_fold, models=models), replace(CONFIG, n_genes=(10,))
    found = run(fold, replace(config, readout="full"))
    row = found.models["hibio"]
    lists = {s.slide_id: s.neighbours for s in (*fold.train, *fold.test)}

    def beside(image):
        mean = {
            n: [x[[j for j in own if j >= 0]].mean(axis=0) for own in lists[n]]
            for n, x in image.items()
        }
        return {n: np.hstack([x, mean[n]]) for n, x in image.items()}

    wide = tuple(replace(model, image=beside(model.image)) for model in models)
    slow = run(replace(fold, models=wide), config).models
    for name in ("hibio", "raw_features"):
        niche = found.models[name]["pearson_combined_niche/top10_hvg"].values
        assert niche == pytest.approx(slow[name]["pearson_combined/top10_hvg"].values, abs=1e-9)
    niche, random, alone = (
        row[f"pearson_combined{item}/top10_hvg"].mean for item in ("_niche", "_random_graph", "")
    )
    assert niche > max(random, alone) + 0.03
    plain = run(fold, config).models["hibio"]
    assert {name: row[name] for name in plain} == plain
    extra = {
        f"pearson_combined{i}{p}/top10_hvg"
        for i in ("_niche", "_random_graph")
        for p in ("", "_pooled")
    }
    assert set(row) - set(plain) == extra
    with pytest.raises(FoldError, match="expression readout 'all'; it must be one of plain, full"):
        ExpressionConfig(readout="all")


def test_one_training_patient_uses_spatial_blocks(toy_fold):
    one = replace(toy_fold, train=toy_fold.train[:2])
    config = ExpressionConfig(n_genes=(10,), ridge=RidgeConfig(n_folds=3))
    assert run(one, config).models["hibio"]["pearson/top10_hvg"].mean > 0.3


def test_without_images_the_task_says_so(toy_fold):
    blind = replace(toy_fold, test=tuple(replace(s, has_image=False) for s in toy_fold.test))
    result = run(blind, CONFIG)
    assert result.models == {}
    assert "not run" in result.notes[0]


def test_task_table_suggests_the_nearest_name():
    expected = {"expression", "retrieval", "domains", "regions", "annotation", "imputation"}
    assert expected | {"pathway_query", "imputation", "outcome"} <= set(TASKS)
    with pytest.raises(ValueError, match="did you mean 'retrieval'"):
        find_task("retreival")


def test_raw_features_of_the_fold_stand_beside_and_get_no_values(toy_fold, result):
    own, raw = toy_fold.model("hibio"), toy_fold.model("raw_features")
    found = run(replace(toy_fold, models=(own,), raw_features=raw), CONFIG).models
    assert set(found) == {"hibio", "mean", "neighbour_oracle"}
    assert found["hibio"] == result.models["hibio"]
