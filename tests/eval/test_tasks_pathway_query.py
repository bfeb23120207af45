"""Pathway query: planted sets are read off the image, independent ones are not."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from eval.measures.ridge import zscore_mean
from eval.tasks.pathway_query import PathwayQueryConfig, anchor_scores, run
from eval.tasks.probes import ImageProbe
from tests.eval.conftest import make_fold

CONFIG = PathwayQueryConfig()


@pytest.fixture(scope="module")
def result(toy_fold):
    return run(toy_fold, CONFIG)


@dataclass(frozen=True)
class Renamed:
    """The same sets under other names: sets that no model was trained on."""

    base: object

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"NEW_{name}" for name in self.base.names)

    def match(self, tfidf):
        return self.base.match(tfidf)


def test_planted_sets_are_read_off_the_image_by_every_readout(result):
    row = result.models["hibio"]
    for readout in ("anchor", "ridge", "retrieval", "default"):
        assert row[f"pearson/{readout}/mean"].mean > 0.6
        assert row[f"spearman/{readout}/median"].mean > 0.6
        assert row[f"spearman_planted/{readout}/median"].mean > 0.6
    assert row["pearson/default/mean"].keys == ["toy/0/c1", "toy/0/c2"]
    assert "pearson/anchor/mean" not in result.models["raw_features"]
    assert result.models["raw_features"]["pearson/ridge/mean"].mean > 0.5
    assert abs(result.models["coordinates"]["pearson/default/mean"].mean) < 0.3
    assert result.models["measured_oracle"]["spearman_planted/measured/median"].mean > 0.6


def test_independent_images_show_no_pathway(null_fold):
    models = run(null_fold, CONFIG).models
    assert models["hibio"].keys() >= {"pearson/default/mean", "spearman/default/median"}
    for model, row in models.items():
        for metric, found in row.items():
            assert abs(found.mean) < 0.2, (model, metric)


def test_values_equal_scipy_set_by_set(toy_fold, result):
    probe = ImageProbe.of(toy_fold, toy_fold.model("hibio"))
    train = np.concatenate([toy_fold.anchors.match(s.tfidf) for s in toy_fold.train])
    first = toy_fold.test[0]
    ridge, near = probe.ridge(train, CONFIG.ridge)[:120], probe.nearest(train, 50)[:120]
    truth = toy_fold.anchors.match(first.tfidf)
    both = zscore_mean(ridge, near)
    pearson = [pearsonr(both[:, m], truth[:, m])[0] for m in range(truth.shape[1])]
    row = result.models["hibio"]
    assert row["pearson/default/mean"].values[0] == pytest.approx(np.mean(pearson), abs=1e-6)
    rank = [spearmanr(ridge[:, m], first.labels[f"activity:SET{m}"])[0] for m in range(4)]
    assert row["spearman_planted/ridge/median"].values[0] == pytest.approx(np.median(rank))


def test_real_sets_stand_beside_matched_random_ones(result):
    real = result.models["hibio"]["pearson/default/mean"].mean
    random = result.models["matched_random"]
    assert real > random["pearson/default/mean"].mean
    assert not any("planted" in metric or "anchor" in metric for metric in random)
    assert any("read from hibio" in note for note in result.notes)


def test_without_random_sets_the_missing_control_is_named(toy_fold):
    result = run(replace(toy_fold, random_sets=None), CONFIG)
    assert "matched_random" not in result.models
    assert any("control row is missing" in note for note in result.notes)


def test_anchor_scores_are_cosines_standardised_on_training_and_centred_per_spot(toy_fold):
    model = toy_fold.model("hibio")
    found = anchor_scores(toy_fold, model, model.anchor[:4])[0]

    def cosine(slide):
        rows = model.image[slide.slide_id]
        top = rows @ model.anchor[:4].T
        lengths = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(model.anchor[:4], axis=1)
        return top / lengths

    train = np.concatenate([cosine(s) for s in toy_fold.train])
    score = (cosine(toy_fold.test[0]) - train.mean(axis=0)) / train.std(axis=0)
    np.testing.assert_allclose(found, score - score.mean(axis=1, keepdims=True))


def test_other_test_counts_do_not_change_the_other_slide(result):
    after = run(make_fold(changed="c2"), CONFIG).models["hibio"]["pearson/default/mean"].values
    before = result.models["hibio"]["pearson/default/mean"].values
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_set_that_never_varies_is_left_out_and_counted(toy_fold):
    flat = replace(toy_fold.anchors, sd=np.array([0.0, *toy_fold.anchors.sd[1:]]))
    result = run(replace(toy_fold, anchors=flat), CONFIG)
    assert any("1 gene sets have a constant measured score" in note for note in result.notes)
    assert result.models["hibio"]["pearson/default/mean"].mean > 0.5


def test_without_pathways_the_task_says_so(toy_fold):
    empty = replace(
        toy_fold.anchors,
        names=(),
        matrix=toy_fold.anchors.matrix[:, :0],
        mean=np.zeros(0),
        sd=np.zeros(0),
    )
    for anchors in (None, empty):
        result = run(replace(toy_fold, anchors=anchors), CONFIG)
        assert result.models == {}
        assert "not run" in result.notes[0]
