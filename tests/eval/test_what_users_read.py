"""What a result rests on: signs, standardising, folds by patient, and rows that belong together.

Each test fails under one small change of the code that moves no shape and raises no error.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_sample_weight

from eval.folds.assemble import seed_means
from eval.folds.fold import Fold, Representation
from eval.measures.metrics import pearson_per_gene
from eval.measures.ridge import (
    COLUMNS,
    RidgeConfig,
    Targets,
    centre,
    choose_alpha,
    knn_mean,
    ridge_fit_predict,
    zscore,
    zscore_mean,
)
from eval.query import GeneSets, image_scores, query_folder, shown_sets, write_scores
from eval.run import evaluate
from eval.tasks.annotation import AnnotationConfig, Labelled, choose_c
from eval.tasks.probes import ImageProbe
from hibio import HiBio, bank
from hibio.bank import Bank, build_bank, read_bank
from hibio.config.files import ConfigError
from hibio.config.training import StageConfig
from hibio.data.counts import align_columns
from hibio.data.dataset import PreparedSlides
from hibio.data.splits import read_entries
from hibio.run import train_all
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.hibio.toy import SPOT, edit_store, make_model, make_slide, run_config

PER_SLIDE, N_DIMS = 30, 20
SLIDES = {"a1": "A", "a2": "A", "a3": "A", "b1": "B", "b2": "B", "c1": "C"}


@dataclass(frozen=True)
class Planted:
    """A bank with two sets that the image tells, and a query slide with its truth (S, 2)."""

    bank: Bank
    sets: GeneSets
    image: np.ndarray
    truth: np.ndarray


def planted(misleading: float = 0.0) -> Planted:
    """Sets read from the first two dimensions.

    Args:
        misleading: how much a dimension says in the slides of one patient that is wrong in others,
            and how far the level of the sets differs between slides of one patient.
    """
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((N_DIMS - 2, 2)) for name in "ABC"}
    level = {slide: misleading * 3 * rng.standard_normal(2) for slide in SLIDES}
    images, targets = [], []
    for slide, patient in SLIDES.items():
        image = rng.standard_normal((PER_SLIDE, N_DIMS))
        noise = 0.3 * rng.standard_normal((PER_SLIDE, 2))
        own = misleading * image[:, 2:] @ weights[patient]
        images.append(image)
        targets.append(image[:, :2] + noise + own + level[slide])
    slides = np.repeat(list(SLIDES), PER_SLIDE)
    patients = np.repeat(list(SLIDES.values()), PER_SLIDE)
    nothing = sparse.csr_matrix((len(slides), 1))
    sets = GeneSets(("S", "T"), (), nothing, np.zeros(2), np.ones(2), np.concatenate(targets))
    query = rng.standard_normal((PER_SLIDE, N_DIMS))
    return Planted(
        Bank(np.concatenate(images), nothing, slides, patients), sets, query, query[:, :2]
    )


def scores(one: Planted, readout: str) -> np.ndarray:
    """Scores of the query slide; the checkpoint is read for the anchors only."""
    return image_scores(None, one.sets, one.bank, one.image, readout)  # type: ignore[arg-type]


# --- gene-set queries ------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["default", "ridge", "retrieval"])
def test_query_scores_rise_with_what_was_planted(readout):
    one = planted()
    assert (pearson_per_gene(scores(one, readout), one.truth) > 0.4).all()


@pytest.mark.parametrize("readout", ["default", "ridge", "retrieval"])
def test_the_bank_and_the_query_are_standardised_per_slide(readout):
    one = planted()
    offset = np.repeat(10.0 * np.arange(len(SLIDES)), PER_SLIDE)[:, None]
    scale = (
        1.0 if readout != "ridge" else np.repeat(2.0 ** np.arange(len(SLIDES)), PER_SLIDE)[:, None]
    )
    moved = replace(one, bank=replace(one.bank, image=scale * one.bank.image + offset))
    np.testing.assert_allclose(scores(moved, readout), scores(one, readout), atol=1e-8)
    moved = replace(one, image=one.image - 20.0)
    np.testing.assert_allclose(scores(moved, readout), scores(one, readout), atol=1e-8)


def ridge_of(one: Planted, groups: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Ridge scores of the query slide with other inner folds or other units."""
    parts = [zscore(one.bank.image[one.bank.slide == slide]) for slide in SLIDES]
    x, query = np.concatenate(parts), zscore(one.image)
    return ridge_fit_predict(x, one.sets.target, query, groups=groups, units=units)


def test_the_penalty_of_a_query_is_chosen_over_patients_within_slides():
    one = planted(misleading=0.2)
    slides, patients = one.bank.slide, one.bank.patient
    found = scores(one, "ridge")
    np.testing.assert_allclose(found, ridge_of(one, patients, slides), rtol=1e-9)
    for groups, units in ((slides, slides), (patients, patients)):
        assert np.abs(found - ridge_of(one, groups, units)).max() > 1e-3


def test_many_sets_score_as_all_at_once():
    one, rng = planted(), np.random.default_rng(1)
    mix = rng.standard_normal((2, 2 * COLUMNS + 30))
    mix[:, 5] = 0.0  # says nothing on any spot
    names = tuple(f"S{m}" for m in range(mix.shape[1]))
    many = replace(one, sets=replace(one.sets, names=names, target=one.sets.target @ mix))
    slides, y = one.bank.slide, Targets.of(many.sets.target, one.bank.slide)
    rows = np.concatenate([centre(one.bank.image[slides == slide]) for slide in SLIDES])
    near = y.back(knn_mean(rows, y.z, centre(one.image)))
    ridge = ridge_of(many, one.bank.patient, slides)
    for readout, slow in (
        ("ridge", ridge),
        ("retrieval", near),
        ("default", zscore_mean(ridge, near)),
    ):
        np.testing.assert_allclose(scores(many, readout), slow, atol=1e-10)


def test_a_slide_that_is_the_same_everywhere_scores_nothing():
    one = planted()
    alike = replace(one, image=np.tile(one.image[:1] / 3, (len(one.image), 1)))
    assert not scores(alike, "default").any()


def test_the_sets_shown_are_those_that_vary_most():
    """About 3, by a thousandth: squares in float32 would not tell them apart."""
    spread = np.array([0.001, 0.004, 0.002, 0.006, 0.003])
    noise = np.random.default_rng(0).standard_normal((2000, 5))
    assert shown_sets((3 + spread * noise).astype(np.float32), 4) == [3, 1, 4, 2]


@pytest.mark.parametrize("size", [1.0, 9.1, 9.99996, 2e6])
def test_a_table_of_scores_is_what_pandas_writes(tmp_path, size):
    values = np.random.default_rng(0).standard_normal((4, 5))
    values *= size / np.abs(values).max()
    values[0, :4] = 0.0, 0.25, -0.00004, 12.0 / 7
    index = pd.Index(["a", 'b"1', "c,d", "x y"], name="barcode")
    frame = pd.DataFrame(values, index, ["S", "T,1", "U", "V", "W"])
    write_scores(tmp_path / "fast.csv", frame)
    assert (tmp_path / "fast.csv").read_text() == frame.to_csv(float_format="%.4f")


def test_scores_that_hardly_vary_are_not_rounded_to_one(tmp_path):
    """A ridge of the strongest penalty: four decimals would make them 0.0000 all."""
    frame = pd.DataFrame({"S": np.linspace(0, 1e-5, 9), "T": np.linspace(-1, 1, 9)})
    write_scores(tmp_path / "s.csv", frame)
    found = pd.read_csv(tmp_path / "s.csv", index_col=0)
    np.testing.assert_allclose(found, frame, rtol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(toy_stores, tmp_path_factory) -> Path:
    """Trained for a moment on pairs that were shuffled."""
    quick = (StageConfig("spot", 1, SPOT),)
    config = run_config(toy_stores, tmp_path_factory.mktemp("users"), stages=quick)
    config = replace(config, data=replace(config.data, shuffle_pairs=True))
    (path,) = train_all(config)
    return path


def test_written_query_scores_rise_with_the_measured_ones(checkpoint, toy_stores, tmp_path):
    query_folder(checkpoint, toy_stores, "default", tmp_path)
    trained_on = HiBio.from_checkpoint(checkpoint).artifacts.train_slides
    for slide in trained_on:  # the bank holds their spots
        found = pd.read_csv(tmp_path / f"{slide}.query.csv", index_col=0).to_numpy()
        adata = anndata.read_h5ad(tmp_path / f"{slide}.query.h5ad")
        np.testing.assert_allclose(adata.X, found, atol=5.1e-5)  # four decimals
        assert np.nanmean(pearson_per_gene(found, adata.layers["measured"])) > 0.2


# --- the reference bank ----------------------------------------------------------------------


def test_a_thinned_bank_keeps_profile_and_embedding_of_the_same_spots(
    toy_stores, toy_artifacts, monkeypatch
):
    model = make_model(toy_artifacts)
    dataset = PreparedSlides(read_entries(stores_in(toy_stores))[:2], toy_artifacts, "handcrafted")
    whole = build_bank(model, dataset)
    monkeypatch.setattr(bank, "MAX_SPOTS", 35)
    few = build_bank(model, dataset)
    assert 33 <= len(few.image) <= 35
    for image, profile, slide in zip(few.image, few.tfidf, few.slide, strict=True):
        away = np.abs(whole.image - image).sum(axis=1)
        spot = int(np.argmin(np.where(whole.slide == slide, away, np.inf)))
        assert abs(profile - whole.tfidf[spot]).max() == 0


def test_a_run_on_shuffled_pairs_keeps_a_bank_of_true_pairs(checkpoint, toy_stores):
    found = read_bank(checkpoint / "bank.h5")
    model = HiBio.from_checkpoint(checkpoint)
    for slide in np.unique(found.slide):
        true = make_slide(toy_stores, model.artifacts, slide)
        image = model.encode_slide(true).image
        np.testing.assert_allclose(found.image[found.slide == slide], image, atol=2e-3)
        with SlideStore(toy_stores / f"{slide}.h5") as store:
            counts = align_columns(store.counts(), store.gene_names, model.artifacts.genes)
        profiles = model.artifacts.tfidf.transform(counts).toarray()
        own = found.tfidf[found.slide == slide].toarray()
        np.testing.assert_allclose(own, profiles, atol=1e-3)


# --- splits and penalties --------------------------------------------------------------------


def test_a_patient_on_both_sides_is_refused(checkpoint, toy_stores, tmp_path):
    trained_on = HiBio.from_checkpoint(checkpoint).artifacts.train_slides
    (tmp_path / "stores").mkdir()
    for path in stores_in(toy_stores):
        (tmp_path / "stores" / path.name).hardlink_to(path)
    new = next(path for path in stores_in(toy_stores) if path.stem not in trained_on)
    with SlideStore(toy_stores / f"{sorted(trained_on)[0]}.h5") as store:
        patient = store.patient_id
    (tmp_path / "stores" / new.name).unlink()
    edit_store(new, tmp_path / "stores" / new.name, lambda f: f.attrs.update(patient_id=patient))
    with pytest.raises(ConfigError, match=rf"patients {patient} are on both sides of the split"):
        evaluate(checkpoint, tmp_path / "stores", tmp_path / "out", ["regions"])


def test_the_probe_is_chosen_on_patients_that_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    y = rng.choice(["x", "y"], 240)
    x = rng.standard_normal((240, 60))
    x[:, 0] += y == "x"
    data = Labelled(x, y, np.repeat(list("pqrs"), 60))
    config = AnnotationConfig(grid=(0.001, 10.0), n_folds=4)
    held_out, own = np.zeros(2), np.zeros(2)
    for i, c in enumerate(config.grid):
        for patient in "pqrs":
            inner = data.patient != patient
            probe = LogisticRegression(C=c, class_weight="balanced", max_iter=300, tol=1e-3)
            probe.fit(x[inner], y[inner])
            for score, rows in ((held_out, ~inner), (own, inner)):
                weight = compute_sample_weight("balanced", y[rows])
                score[i] -= log_loss(y[rows], probe.predict_proba(x[rows]), sample_weight=weight)
    assert np.argmax(own) != np.argmax(held_out)
    assert choose_c(data, config) == config.grid[int(np.argmax(held_out))]


def test_the_penalty_of_ridge_is_chosen_by_correlation_within_slides(toy_fold):
    """Against scikit-learn, where slides of one patient differ in their level."""
    one = planted(misleading=0.15)
    x, y, config = one.bank.image, one.sets.target, RidgeConfig(n_folds=3)
    groups, slides = one.bank.patient, one.bank.slide

    def brute_force(units: np.ndarray) -> float:
        rows: dict[str, np.ndarray] = {}
        for held in np.unique(groups):
            inner = groups != held
            scale = x[inner].var(axis=0).mean() * inner.sum()
            for i, candidate in enumerate(config.grid):
                found = Ridge(alpha=candidate * scale).fit(x[inner], y[inner]).predict(x)
                for unit in np.unique(units[~inner]):
                    own = ~inner & (units == unit)
                    row = rows.setdefault(str(unit), np.zeros(len(config.grid)))
                    row[i] = pearson_per_gene(found[own], y[own]).mean()
        score = np.stack(list(rows.values()))
        best = int(np.argmax(score.mean(axis=0)))
        error = score[:, best].std(ddof=1) / np.sqrt(len(score))
        near = np.flatnonzero(score.mean(axis=0) >= score.mean(axis=0)[best] - error)
        return config.grid[int(near[-1])] * x.var(axis=0).mean() * len(x)

    found = choose_alpha(x, y, groups, slides, config)
    assert found == pytest.approx(brute_force(slides))
    assert found != pytest.approx(brute_force(groups))
    probe = ImageProbe.of(toy_fold, toy_fold.model("hibio"))
    where = [s.slide_id for s in toy_fold.train for _ in range(s.n_spots)]
    assert probe.units.tolist() == probe.groups.tolist() == where  # two patients: slides


def test_the_mean_over_seeds_reads_every_seed():
    rng = np.random.default_rng(1)

    def unit(n: int) -> np.ndarray:
        rows = rng.standard_normal((n, 4))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    sides = [({"s": unit(5)}, {"s": unit(7)}) for _ in range(3)]
    folds = [
        Fold("f", seed, np.array(["G"]), (), (), (Representation("hibio", image, omics),))
        for seed, (image, omics) in enumerate(sides)
    ]
    mean = seed_means(folds).model("hibio_seed_mean")
    expected = np.mean([image["s"] @ omics["s"].T for image, omics in sides], axis=0)
    np.testing.assert_allclose(mean.image["s"] @ mean.omics["s"].T / 3, expected)
