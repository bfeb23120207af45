"""Retrieval: planted pairs are found, independent ones are at chance, shuffling destroys it."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from eval.errors import FoldError
from eval.folds.fold import Representation
from eval.measures.metrics import list_length, recall_at_k
from eval.measures.ridge import RidgeConfig
from eval.tasks.probes import Pairs, pairs_of, raw_bridge, side_by_side
from eval.tasks.retrieval import (
    RetrievalConfig,
    choose_share,
    csls,
    identity_accuracy,
    run,
    sinkhorn,
)

DIRECTIONS = ("image_to_omics", "omics_to_image")


@pytest.fixture(scope="module")
def result(toy_fold):
    return run(toy_fold, RetrievalConfig())


def only(fold, name: str, **changes):
    """The fold with one model, changed."""
    return replace(fold, models=(replace(fold.model(name), **changes),))


def test_planted_pairs_are_found_in_both_directions(result):
    row = result.models["hibio"]
    for direction in DIRECTIONS:
        assert row[f"{direction}/recall@10%"].mean > 0.9
        assert row[f"{direction}/recall@10%"].keys == ["toy/0/c1", "toy/0/c2"]
        assert row[f"{direction}/pooled_recall@10%"].keys == ["toy/0/pooled"]
        assert row[f"{direction}/median_rank"].mean < 0.05
        assert row[f"{direction}/recall@10%_csls"].mean > 0.9
        assert row[f"{direction}/mrr_sinkhorn"].mean > 0.5
    assert "item: spot" in result.notes[0]


def test_chance_is_printed_for_the_pool(result):
    row = result.models["hibio"]
    assert row["image_to_omics/recall@5"].chance == pytest.approx(5 / 120)
    assert row["image_to_omics/recall@1%"].chance == pytest.approx(1 / 120)
    assert row["image_to_omics/recall@10%"].chance == pytest.approx(0.1)
    assert row["image_to_omics/pooled_recall@5"].chance == pytest.approx(5 / 240)
    assert row["image_to_omics/median_rank"].chance == 0.5


def test_independent_sides_are_at_chance(null_fold):
    models = run(null_fold, RetrievalConfig()).models
    for name in ("hibio", "ridge_to_lsa", "coordinates"):
        for direction in DIRECTIONS:
            for suffix in ("", "_csls", "_sinkhorn"):
                found = models[name][f"{direction}/recall@10%{suffix}"]
                assert found.mean == pytest.approx(0.1, abs=0.08), (name, suffix)
            assert models[name][f"{direction}/median_rank"].mean == pytest.approx(0.5, abs=0.12)


def test_shuffled_pairs_fall_to_chance(toy_fold):
    rng = np.random.default_rng(0)
    model = toy_fold.model("hibio")
    shuffled = {name: rows[rng.permutation(len(rows))] for name, rows in model.omics.items()}
    row = run(only(toy_fold, "hibio", omics=shuffled), RetrievalConfig()).models["hibio"]
    assert row["image_to_omics/recall@10%"].mean < 0.2


def test_ridge_bridges_raw_features_and_coordinates_to_the_spot_vector(result):
    assert result.models["ridge_to_lsa"]["image_to_omics/recall@10%"].mean > 0.4
    assert result.models["coordinates"]["image_to_omics/recall@10%"].mean < 0.25
    assert "image_to_omics/recall@10%" not in result.models["raw_features"]
    assert "lsa" not in result.models


def test_combined_is_the_rank_under_the_weighted_sum_of_the_two_cosines(toy_fold, result):
    own, raw = toy_fold.model("hibio"), toy_fold.model("raw_features")
    bridge = raw_bridge(toy_fold, "raw_features", RidgeConfig())
    share = choose_share(pairs_of(toy_fold, own, "raw_features", RidgeConfig()), bridge)
    assert f"combined, fold toy/0/hibio: weight of its own cosine {share:g}" in result.notes
    for index, slide in enumerate(toy_fold.test):
        sides = [
            (own.image[slide.slide_id], own.omics[slide.slide_id]),
            (bridge.image[index], raw.omics[slide.slide_id]),
        ]
        both = [cosine_similarity(a - a.mean(0), b - b.mean(0)) for a, b in sides]
        cosine = share * both[0] + (1 - share) * both[1]
        row = result.models["hibio"]
        for name, matrix in (("image_to_omics", cosine), ("omics_to_image", cosine.T)):
            found = row[f"{name}/recall@10%_combined"].values[index]
            assert found == pytest.approx(recall_at_k(matrix, list_length(0.1, len(matrix))))
    assert "image_to_omics/recall@10%_combined" not in result.models["coordinates"]


def test_the_weight_is_the_side_that_finds_more_on_training_slides_and_a_half_between_equals():
    rng = np.random.default_rng(0)
    truth = [rng.standard_normal((80, 5)) for _ in range(3)]

    def sides(noise: float) -> Pairs:
        seen = [x + noise * rng.standard_normal(x.shape) for x in truth]
        return Pairs("m", [], [], Pairs("m", seen, truth))

    assert choose_share(sides(0.3), sides(30.0)) > 0.5
    assert choose_share(sides(30.0), sides(0.3)) < 0.5
    alike = sides(1.5)
    assert choose_share(alike, alike) == 0.5
    assert choose_share(alike, replace(alike, train=None)) == 0.5


def test_full_is_sinkhorn_on_the_combined_cosine_beside_niches_of_random_spots(toy_fold, result):
    rng, model = np.random.default_rng(3), toy_fold.model("hibio")
    noisy = {n: x + 3.0 * rng.standard_normal(x.shape) for n, x in model.image.items()}
    fold = replace(
        only(toy_fold, "hibio", image=noisy), raw_features=toy_fold.model("raw_features")
    )
    found = run(fold, RetrievalConfig(readout="full", identity_spots=0))
    row, metric = found.models["hibio"], "image_to_omics/recall@10%"
    pairs = pairs_of(fold, fold.model("hibio"), "raw_features", RidgeConfig())
    bridge = raw_bridge(fold, "raw_features", RidgeConfig())
    both = side_by_side(pairs, bridge, choose_share(pairs, bridge))
    scaled = sinkhorn(cosine_similarity(both.image[0], both.omics[0]))
    expected = recall_at_k(scaled, list_length(0.1, len(scaled)))
    assert row[f"{metric}_full"].values[0] == pytest.approx(expected)
    for suffix in ("_full", "_full_niche", "_full_random_graph"):
        assert found.measures[f"{metric}{suffix}"].transductive
    places = [row[f"image_to_omics/median_rank_full{s}"].mean for s in ("_niche", "_random_graph")]
    assert places[0] != places[1]
    assert not any("_full" in name for name in result.models["hibio"])
    with pytest.raises(FoldError, match="one of plain, full"):
        RetrievalConfig(readout="all")


def test_two_weak_halves_find_more_together(toy_fold):
    rng = np.random.default_rng(3)
    model = toy_fold.model("hibio")
    noisy = {n: x + 2.0 * rng.standard_normal(x.shape) for n, x in model.image.items()}
    clear = toy_fold.model("raw_features")
    veiled = {n: x + 1.0 * rng.standard_normal(x.shape) for n, x in clear.image.items()}
    raw = replace(clear, image=veiled)
    found = run(replace(only(toy_fold, "hibio", image=noisy), raw_features=raw), RetrievalConfig())
    row = found.models["hibio"]
    metric = "image_to_omics/recall@10%"
    assert row[f"{metric}_combined"].mean > row[metric].mean + 0.05
    bridge = run(replace(toy_fold, models=(raw,)), RetrievalConfig()).models["ridge_to_lsa"]
    assert row[f"{metric}_combined"].mean > bridge[metric].mean + 0.02
    alone = run(only(toy_fold, "hibio", image=noisy), RetrievalConfig()).models["hibio"]
    assert f"{metric}_combined" not in alone


def test_a_later_seed_bridges_to_the_spot_vector_kept_beside_the_models(toy_fold, result):
    raw = toy_fold.model("raw_features")
    later = replace(only(toy_fold, "coordinates"), raw_features=raw)
    found = run(later, RetrievalConfig()).models["coordinates"]
    first = result.models["coordinates"]
    metric = "image_to_omics/recall@10%"
    assert found[metric].values == first[metric].values


def test_an_offset_of_a_slide_does_not_matter(toy_fold, result):
    model = toy_fold.model("hibio")
    moved = {name: rows + 50.0 + i for i, (name, rows) in enumerate(model.image.items())}
    row = run(only(toy_fold, "hibio", image=moved), RetrievalConfig()).models["hibio"]
    base = result.models["hibio"]
    for metric in ("image_to_omics/recall@5", "omics_to_image/pooled_recall@5"):
        np.testing.assert_allclose(row[metric].values, base[metric].values)


def test_a_niche_is_reported_beside_the_same_average_over_random_spots(toy_fold):
    rng = np.random.default_rng(2)
    model = toy_fold.model("hibio")
    noisy = {n: x + 6.0 * rng.standard_normal(x.shape) for n, x in model.image.items()}
    fold = only(toy_fold, "hibio", image=noisy)
    spot = run(fold, RetrievalConfig()).models["hibio"]
    niche = run(fold, RetrievalConfig(item="niche")).models["hibio"]
    metric = "image_to_omics/recall@10%"
    assert niche[metric].mean > spot[metric].mean
    assert f"{metric}_random_graph" in niche
    assert f"{metric}_random_graph" not in spot
    with pytest.raises(FoldError, match="'spot' or 'niche'"):
        RetrievalConfig(item="slide")


def test_large_slides_skip_the_transductive_rows_and_say_so(toy_fold):
    fold = only(toy_fold, "hibio")
    result = run(fold, RetrievalConfig(max_transductive=100))
    assert not any("csls" in name for name in result.models["hibio"])
    assert any("no csls" in note for note in result.notes)


def test_two_spaces_are_refused_unless_marked(toy_fold):
    wide = {name: np.hstack([x, x]) for name, x in toy_fold.model("hibio").omics.items()}
    with pytest.raises(FoldError, match="aligned=False"):
        run(only(toy_fold, "hibio", omics=wide), RetrievalConfig())


def test_csls_equals_the_loop():
    s = np.random.default_rng(1).standard_normal((7, 7))
    slow = np.empty_like(s)
    for i in range(7):
        for j in range(7):
            row, column = sorted(s[i])[-3:], sorted(s[:, j])[-3:]
            slow[i, j] = 2 * s[i, j] - np.mean(row) - np.mean(column)
    np.testing.assert_allclose(csls(s, 3), slow)


def test_sinkhorn_is_doubly_stochastic_and_undoes_hubs():
    rng = np.random.default_rng(1)
    s = rng.random((20, 20))
    plan = np.exp(sinkhorn(s, 0.1, 200))
    np.testing.assert_allclose(plan.sum(axis=0), 1.0)
    np.testing.assert_allclose(plan.sum(axis=1), 1.0, atol=1e-3)
    hub = s + rng.random(20)
    difference = sinkhorn(hub, 0.1, 300) - sinkhorn(s, 0.1, 300)
    np.testing.assert_allclose(difference, difference[0, 0], atol=1e-2)


def test_identity_probe_finds_a_stain_and_not_noise(toy_fold):
    slides, rng = toy_fold.paired_train + toy_fold.paired_test, np.random.default_rng(0)
    noise = [rng.standard_normal((s.n_spots, 5)) for s in slides]
    value, chance = identity_accuracy(noise, slides, "slide")
    assert chance == pytest.approx(0.2)
    assert value == pytest.approx(0.2, abs=0.1)
    stained = [rows + 3.0 * i for i, rows in enumerate(noise)]
    assert identity_accuracy(stained, slides, "slide")[0] > 0.9
    assert identity_accuracy(stained, slides, "patient")[1] == pytest.approx(1 / 3)
    assert np.isnan(identity_accuracy(noise[:2], slides[:2], "patient")[0])


def test_a_stain_shows_in_the_task(toy_fold, result):
    model = toy_fold.model("hibio")
    stained = {n: x + 5.0 * i for i, (n, x) in enumerate(model.image.items())}
    row = run(only(toy_fold, "hibio", image=stained), RetrievalConfig()).models["hibio"]
    name = "identity/slide_balanced_accuracy"
    assert row[name].mean > result.models["hibio"][name].mean + 0.3


def test_models_of_one_side_are_left_out(toy_fold):
    model = Representation("omics_only", omics=toy_fold.model("hibio").omics)
    assert "omics_only" not in run(replace(toy_fold, models=(model,)), RetrievalConfig()).models
