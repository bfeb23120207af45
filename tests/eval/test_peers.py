"""Every peer: finds a planted signal, none where there is none, and never sees test counts."""

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation
from eval.peers import PEERS
from eval.peers.peer import (
    NOT_IMPUTED,
    Peer,
    TrainingConfig,
    TrainingData,
    find_peers,
    standardised,
    with_peers,
)
from eval.tasks import domains, expression, retrieval
from tests.eval.conftest import make_fold

SHORT = TrainingConfig(steps=180, batch=64)
SETTINGS = {
    "omiclip": {"n_words": 10},
    "st_net": {"training": dataclasses.replace(SHORT, lr=1e-2)},
    "stagate": {"steps": 60},
    "stagate_tfidf": {"steps": 60},
}
PREDICTORS = ("pca256_ridge", "pca256_ridge_hest", "st_net", "mlp_regression", "triplex", "bleep")
CONTRASTIVE = ("clip", "bleep", "bleep_preprojection", "omiclip", "nicheformer", "st_align")


def quick(name: str, steps: int | None = None) -> Peer:
    """The peer with settings for the toy fold."""
    peer = PEERS[name]
    own = dict(SETTINGS.get(name, {}))
    if hasattr(peer, "training"):
        training = own.get("training", SHORT)
        own["training"] = dataclasses.replace(training, steps=steps or training.steps)
    elif steps and hasattr(peer, "steps"):
        own["steps"] = steps
    return dataclasses.replace(peer, **own)


def features_of(fold: Fold) -> dict[str, np.ndarray]:
    return dict(fold.model("raw_features").image)


def with_one(fold: Fold, name: str) -> Fold:
    """The fold with this peer as its only model."""
    bare = dataclasses.replace(fold, models=())
    return with_peers(bare, [quick(name)], features_of(fold), seedless=True)


def shown(fold: Fold, name: str, seed: int = 0, steps: int = 6) -> Representation:
    """The peer fitted on the training slides for a moment, and what it makes of all slides."""
    scaled = standardised(features_of(fold))
    own = {slide.slide_id: scaled[slide.slide_id] for slide in fold.train}
    data = TrainingData(fold.genes, fold.train, own)
    fitted = quick(name, steps).fit(data, seed)
    return fitted.represent((*fold.train, *fold.test), scaled)


@pytest.fixture(scope="module")
def fitted(toy_fold) -> Callable[[str], Fold]:
    """The fold with this peer alone, fitted when a test first asks."""
    return cache(lambda name: with_one(toy_fold, name))


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_find_planted_expression(fitted, name):
    config = expression.ExpressionConfig(n_genes=(10,))
    models = expression.run(fitted(name), config).models
    assert models[name]["pearson/top10_hvg"].mean > models["mean"]["pearson/top10_hvg"].mean + 0.3
    assert models[name]["pearson_pooled/top10_hvg"].mean > 0.2


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_peers_retrieve_planted_pairs(fitted, name):
    config = retrieval.RetrievalConfig(identity_spots=0, max_transductive=0)
    found = retrieval.run(fitted(name), config).models[name]
    assert found["image_to_omics/recall@10%"].mean > 0.25
    assert found["omics_to_image/recall@10%"].mean > 0.25


def test_the_tfidf_autoencoder_reads_tfidf_and_the_published_one_does_not(toy_fold):
    changed = [dataclasses.replace(s, tfidf=s.tfidf[:, ::-1]) for s in toy_fold.test]
    other = dataclasses.replace(toy_fold, test=tuple(changed))
    for name, same in (("stagate", True), ("stagate_tfidf", False)):
        before, after = (shown(fold, name).omics["c1"] for fold in (toy_fold, other))
        assert np.array_equal(before, after) == same


@pytest.mark.parametrize("name", ["stagate", "stagate_tfidf"])
def test_the_graph_autoencoder_finds_planted_domains(fitted, name):
    fold = fitted(name)
    assert fold.models == ()
    found = domains.run(fold, domains.DomainsConfig(n_seeds=1)).models[name]
    assert found["omics_ari/kmeans"].mean > 0.1
    assert set(fold.per_slide[0].omics) == {slide.slide_id for slide in fold.test}


@pytest.mark.parametrize("name", ["triplex", "st_align"])
def test_nothing_is_found_where_nothing_is_shared(null_fold, name):
    fold = with_one(null_fold, name)
    found = expression.run(fold, expression.ExpressionConfig(n_genes=(10,))).models[name]
    assert abs(found["pearson/top10_hvg"].mean) < 0.15
    if fold.models[0].aligned:
        config = retrieval.RetrievalConfig(identity_spots=0, max_transductive=0)
        recall = retrieval.run(fold, config).models[name]["image_to_omics/recall@10%"]
        assert abs(recall.mean - recall.chance) < 0.08


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].needs_image])
def test_other_test_counts_change_nothing_on_the_image_side(toy_fold, name):
    other = make_fold(changed="c2").test[1]
    swapped = dataclasses.replace(toy_fold.test[1], counts=other.counts, tfidf=other.tfidf)
    changed = dataclasses.replace(toy_fold, test=(toy_fold.test[0], swapped))
    before, after = shown(toy_fold, name), shown(changed, name)
    for slide in (*toy_fold.train, *toy_fold.test):
        where = slide.slide_id
        if before.image is not None:
            np.testing.assert_array_equal(before.image[where], after.image[where])
        if before.prediction is not None:
            old, new = before.prediction.values[where], after.prediction.values[where]
            np.testing.assert_array_equal(old, new)
    if before.omics is not None:
        assert not np.array_equal(before.omics["c2"], after.omics["c2"])
        np.testing.assert_array_equal(before.omics["c1"], after.omics["c1"])


@pytest.mark.parametrize("name", list(PEERS))
def test_the_seed_decides_and_nothing_else(toy_fold, name):
    first = shown(toy_fold, name)
    torch.manual_seed(5)  # the state of others does not matter
    again, other = shown(toy_fold, name), shown(toy_fold, name, seed=1)

    def numbers(one: Representation) -> np.ndarray:
        table = one.image or one.omics or one.prediction.values
        return table["c1"]

    np.testing.assert_array_equal(numbers(first), numbers(again))
    assert np.array_equal(numbers(first), numbers(other)) != PEERS[name].seeded
    assert first.cost.n_parameters > 0
    assert first.cost.seconds > 0
    assert first.cost.source


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].needs_image])
def test_without_features_the_fit_is_refused(toy_fold, name):
    with pytest.raises(FoldError, match=rf"peer {name}: none of the 3 training slides"):
        PEERS[name].fit(TrainingData(toy_fold.genes, toy_fold.train, {}), 0)


def test_peers_that_lack_their_input_are_left_out_aloud(toy_fold, capsys):
    bare = dataclasses.replace(toy_fold, models=())
    fold = with_peers(bare, [quick("clip"), quick("stagate", 2)], None, seedless=True)
    assert [model.name for model in fold.per_slide] == ["stagate"]
    assert fold.models == ()
    assert "no training slide has image features; peers left out: clip" in capsys.readouterr().out


def test_a_slide_without_an_image_gets_no_image_side(toy_fold):
    scaled = standardised(features_of(toy_fold))
    known = {name: rows for name, rows in scaled.items() if name != "c1"}
    own = {slide.slide_id: scaled[slide.slide_id] for slide in toy_fold.train}
    fitted_peer = quick("bleep", 1).fit(TrainingData(toy_fold.genes, toy_fold.train, own), 0)
    found = fitted_peer.represent(toy_fold.test, known)
    assert set(found.image) == set(found.prediction.values) == {"c2"}
    assert set(found.omics) == {"c1", "c2"}


def test_peers_without_a_seed_are_fitted_once_a_fold(toy_fold):
    bare = dataclasses.replace(toy_fold, models=())
    asked = [quick("pca256_ridge"), quick("st_net", 1)]
    later = with_peers(bare, asked, features_of(toy_fold), seedless=False)
    assert [model.name for model in later.models] == ["st_net"]


def test_a_peer_that_was_fitted_is_kept_to_the_last_bit(toy_fold, tmp_path, monkeypatch):
    bare = dataclasses.replace(toy_fold, models=())
    asked = [quick("pca256_ridge"), quick("clip", 1), quick("stagate", 1)]

    def fitted() -> Fold:
        features = features_of(toy_fold)
        return with_peers(bare, asked, features, seedless=True, kept=tmp_path)

    first = fitted()
    for peer in asked:
        monkeypatch.setattr(type(peer), "fit", lambda *_: pytest.fail("fitted again"))
    again = fitted()
    pairs = zip(first.models + first.per_slide, again.models + again.per_slide, strict=True)
    for one, other in pairs:
        np.testing.assert_equal(dataclasses.asdict(one), dataclasses.asdict(other))
    (tmp_path / f"peer-clip-{bare.name}-{bare.seed}.npz").write_bytes(b"PK torn")
    with pytest.raises(FoldError, match=r"peer-clip.*remove it"):
        fitted()


def test_a_fold_without_training_slides_fits_on_its_test_slides(toy_fold):
    alone = dataclasses.replace(toy_fold, train=(), models=())
    fold = with_peers(alone, [quick("clip", 1)], features_of(toy_fold), seedless=True)
    assert set(fold.models[0].image) == {"c1", "c2"}


def test_imputation_says_that_peers_take_no_part(toy_fold):
    from eval.folds.baselines import hide

    hidden = hide(
        toy_fold.train, toy_fold.test, toy_fold.genes, lambda counts, xy_um: {"tfidf": counts}
    )
    bare = dataclasses.replace(toy_fold, models=(), hidden=hidden)
    fold = with_peers(bare, [quick("st_net", 1)], features_of(toy_fold), seedless=True)
    assert NOT_IMPUTED in fold.hidden.notes


def test_names_are_found_or_refused():
    assert find_peers("none", PEERS) == ()
    assert [peer.name for peer in find_peers("all", PEERS)] == list(PEERS)
    assert [peer.name for peer in find_peers("bleep, triplex,bleep", PEERS)] == ["bleep", "triplex"]
    with pytest.raises(FoldError, match=r"unknown peer 'blep'.*did you mean 'bleep'"):
        find_peers("blep", PEERS)
    for name, peer in PEERS.items():
        assert peer.name == name
        assert peer.source
