"""Domains: planted clusters are found, shuffled labels are at zero, smoothing is a plain mean."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from eval.folds.fold import Representation, split_rows
from eval.measures.metrics import ari
from eval.tasks.domains import DomainsConfig, cluster, run, smooth_labels
from preprocessing.graphs import smooth

CONFIG = DomainsConfig(n_seeds=2)


def blobs(slide, spread: float) -> np.ndarray:
    """Embedding whose three clusters are the slide's domains."""
    centres = {"left": 0.0, "middle": 5.0, "right": 10.0, "": 20.0}
    mean = np.array([centres.get(name, 30.0) for name in slide.categories("domain")])
    noise = np.random.default_rng(1).standard_normal((slide.n_spots, 40))
    return spread * noise + mean[:, None] * np.eye(40)[0] * 3


def with_model(fold, spread: float = 1.0, sides: tuple[str, ...] = ("omics",)):
    rows = {slide.slide_id: blobs(slide, spread) for slide in (*fold.train, *fold.test)}
    return replace(fold, models=(Representation("blobs", **dict.fromkeys(sides, rows)),))


def test_planted_clusters_are_found_by_every_method(toy_fold):
    row = run(with_model(toy_fold, sides=("omics", "image")), CONFIG).models["blobs"]
    for side in ("omics", "image"):
        for score in ("ari", "nmi", "ami"):
            for method in ("kmeans", "gmm"):
                assert row[f"{side}_{score}/{method}"].mean > 0.95
                assert f"{side}_{score}/{method}_smooth" in row
                assert f"{side}_{score}/{method}_label_smooth" in row
                assert f"{side}_{score}/{method}_graph" in row
                assert f"{side}_{score}/{method}_graph_smooth" in row
    assert row["omics_ari/kmeans"].keys == ["toy/0/c1:domain", "toy/0/c2:domain"]
    assert row["omics_ari/kmeans"].chance == row["omics_ami/gmm"].chance == 0.0
    assert row["omics_nmi/kmeans"].chance is None


def test_shuffled_labels_are_at_zero(null_fold):
    models = run(replace(null_fold, models=null_fold.models[:1]), CONFIG).models
    for name, metric in models["hibio"].items():
        if "_ari/" in name or "_ami/" in name:
            assert abs(metric.mean) < 0.06, name


def test_smoothing_helps_where_the_embedding_is_noisy_and_the_domain_smooth(toy_fold):
    slide = toy_fold.test[0]
    halves = np.where(slide.xy_um[:, 0] > 550, "right", "left").astype(object)
    striped = replace(slide, labels=pd.DataFrame({"domain": halves}))
    fold = with_model(replace(toy_fold, test=(striped,)), spread=20.0)
    row = run(fold, CONFIG).models["blobs"]
    assert row["omics_ari/kmeans_smooth"].mean > row["omics_ari/kmeans"].mean + 0.2


def test_smoothing_equals_a_loop_and_keeps_a_constant():
    rows = np.random.default_rng(0).standard_normal((5, 2))
    near = np.array([[1, 2], [0, -1], [4, 3], [-1, -1], [0, 1]])
    slow = rows
    for _ in range(3):
        slow = np.stack([slow[[i, *[n for n in near[i] if n >= 0]]].mean(0) for i in range(5)])
    np.testing.assert_allclose(smooth(rows, near, 3), slow)
    np.testing.assert_allclose(smooth(np.ones((5, 2)), near, 4), 1.0)


def test_scale_and_rotation_of_the_embedding_do_not_matter(toy_fold):
    fold = with_model(toy_fold, spread=6.0)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((40, 40)))[0]
    moved = {name: 1e-3 * rows @ turn + 4 for name, rows in fold.models[0].omics.items()}
    config = replace(CONFIG, n_components=40)
    base = run(fold, config).models["blobs"]["omics_ari/gmm"].mean
    other = run(replace(fold, models=(Representation("blobs", omics=moved),)), config)
    assert other.models["blobs"]["omics_ari/gmm"].mean == pytest.approx(base, abs=0.1)


def test_undetermined_and_rare_classes_are_left_out_and_named(toy_fold):
    labels = toy_fold.test[0].labels.copy()
    labels.loc[labels.index[10:14], "domain"] = "rare"
    slide = replace(toy_fold.test[0], labels=labels)
    result = run(with_model(replace(toy_fold, test=(slide,))), CONFIG)
    assert any("['rare']" in note for note in result.notes)
    assert result.models["blobs"]["omics_ari/kmeans"].mean > 0.9


def test_without_two_classes_the_task_says_so(toy_fold):
    labels = pd.DataFrame({"domain": ["x"] * 120, "score": np.zeros(120)})
    slides = tuple(replace(s, labels=labels) for s in toy_fold.test)
    result = run(replace(toy_fold, test=slides), CONFIG)
    assert result.models == {}
    assert "not run" in result.notes[0]


def test_the_tied_mixture_sees_elongated_clusters_that_k_means_cuts():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 2)) @ np.linalg.cholesky([[1.0, 0.9], [0.9, 1.0]]).T
    rows[200:, 0] += 2.0
    truth = np.repeat(["a", "b"], 200)
    assert ari(truth, cluster(rows, 2, "gmm", CONFIG, 0)) > 0.9
    assert ari(truth, cluster(rows, 2, "kmeans", CONFIG, 0)) < 0.4


def test_rows_are_cut_back_into_slides(toy_fold):
    parts = split_rows(np.arange(240)[:, None], toy_fold.test)
    assert [len(part) for part in parts] == [120, 120]
    assert parts[1][0, 0] == 120


def test_label_smoothing_equals_a_vote_in_a_loop() -> None:
    rng = np.random.default_rng(3)
    labels, near = rng.integers(4, size=30), rng.integers(-1, 30, size=(30, 5))
    slow = labels.copy()
    for spot in range(30):
        votes = [labels[spot]] + [labels[n] for n in near[spot] if n >= 0]
        most = max(votes.count(label) for label in set(votes))
        best = [label for label in sorted(set(votes)) if votes.count(label) == most]
        slow[spot] = labels[spot] if labels[spot] in best else best[0]
    np.testing.assert_array_equal(smooth_labels(labels, near, 1), slow)
    twice = smooth_labels(smooth_labels(labels, near, 1), near, 1)
    np.testing.assert_array_equal(smooth_labels(labels, near, 2), twice)


def test_label_smoothing_keeps_lonely_spots_and_whole_regions_and_no_rounds_change_nothing() -> (
    None
):
    labels = np.array([0, 0, 1, 1, 2])
    near = np.array([[1, -1], [0, -1], [3, -1], [2, -1], [-1, -1]])
    for rounds in (0, 1, 5):
        np.testing.assert_array_equal(smooth_labels(labels, near, rounds), labels)
    speck = np.array([0, 0, 0, 1])
    full = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    assert smooth_labels(speck, full, 1).tolist() == [0, 0, 0, 0]


def test_label_smoothing_helps_noisy_clusters_and_can_be_compared(toy_fold):
    slide = toy_fold.test[0]
    halves = np.where(slide.xy_um[:, 0] > 550, "right", "left").astype(object)
    halves[:20] = ""  # unlabelled spots take no part in the vote
    striped = replace(slide, labels=pd.DataFrame({"domain": halves}))
    fold = with_model(replace(toy_fold, test=(striped,)), spread=10.0)
    row = run(fold, CONFIG).models["blobs"]
    assert row["omics_ari/kmeans_label_smooth"].mean > row["omics_ari/kmeans"].mean + 0.1


def layers_below_noise(fold, share: float = 1.0):
    """Three planted layers in one dimension of an embedding, white noise in seven wider ones."""
    slide = fold.test[0]
    layer = np.digitize(slide.xy_um[:, 0], [350.0, 750.0])
    rng = np.random.default_rng(2)
    rows = 5.0 * rng.standard_normal((slide.n_spots, 8))
    rows[:, 0] = share * 3.0 * layer + rng.standard_normal(slide.n_spots)
    rows = rows @ np.linalg.qr(rng.standard_normal((8, 8)))[0]
    names = np.array(["one", "two", "three"], dtype=object)[layer]
    slide = replace(slide, labels=pd.DataFrame({"domain": names}))
    model = Representation("hidden", omics={slide.slide_id: rows})
    return replace(fold, test=(slide,), models=(model,))


def test_the_graph_head_finds_layers_hidden_below_wider_noise_and_invents_none(toy_fold):
    row = run(layers_below_noise(toy_fold), CONFIG).models["hidden"]
    for score in ("omics_ari", "omics_ami"):
        assert row[f"{score}/kmeans_graph"].mean > row[f"{score}/kmeans"].mean + 0.3
        assert row[f"{score}/kmeans_graph_smooth"].mean > row[f"{score}/kmeans_smooth"].mean + 0.1
    nothing = run(layers_below_noise(toy_fold, share=0.0), CONFIG).models["hidden"]
    assert abs(nothing["omics_ari/kmeans_graph"].mean) < 0.1
    few = run(layers_below_noise(toy_fold), replace(CONFIG, graph_components=1)).models["hidden"]
    assert few["omics_ari/kmeans_graph"].mean != row["omics_ari/kmeans_graph"].mean


def test_a_slide_without_neighbours_has_no_graph_rows_and_says_so(toy_fold):
    slides = [replace(s, neighbours=np.full_like(s.neighbours, -1)) for s in toy_fold.test[:1]]
    result = run(with_model(replace(toy_fold, test=(*slides, toy_fold.test[1]))), CONFIG)
    row = result.models["blobs"]
    assert row["omics_ari/kmeans_graph"].keys == ["toy/0/c2:domain"]
    assert row["omics_ari/kmeans"].keys == ["toy/0/c1:domain", "toy/0/c2:domain"]
    notes = [note for note in result.notes if "no _graph rows for blobs, omics" in note]
    assert len(notes) == 1
    assert "slide c1" in notes[0]
    assert "found 0 spots with spatial neighbours" in notes[0]
