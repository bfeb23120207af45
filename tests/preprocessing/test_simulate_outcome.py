"""The planted outcome: balanced, carried by a compact niche, and nothing changes without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from preprocessing.errors import DataError
from preprocessing.manifest import read_manifest
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.simulate.config import random_stream
from preprocessing.simulate.layout import draw_lattice
from preprocessing.simulate.programmes import RAISE, draw_outcomes, plant_programmes

PROGRAMMES = {f"P{p:02d}": [f"GENE{(9 * p + g) % 260}" for g in range(12)] for p in range(26)}
SMALL = {"n_slides": 5, "n_patients": 4, "n_spots": 60, "n_genes": 400, "mpp": 4.0, "seed": 2}


def outcomes_of(**settings: float):
    config = SimulateConfig(**{"n_slides": 40, "n_patients": 40, "seed": 1, **settings})
    return draw_outcomes(plant_programmes(PROGRAMMES, config), config)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    return {
        effect: simulate_cohort(
            tmp_path_factory.mktemp("cohort"),
            PROGRAMMES,
            SimulateConfig(**SMALL, outcome_effect=effect),
        )
        for effect in (0.0, 0.2)
    }


@pytest.mark.parametrize("n", [2, 3, 24, 25])
def test_outcomes_are_balanced_and_the_same_whatever_the_effect(n: int) -> None:
    found = outcomes_of(n_slides=n, n_patients=n)
    assert np.bincount(found.outcome).tolist() == [n - n // 2, n // 2]
    again = outcomes_of(n_slides=n, n_patients=n, outcome_effect=0.3)
    np.testing.assert_array_equal(found.outcome, again.outcome)
    assert (found.share == 0).all()


def test_patients_with_the_outcome_have_about_four_times_the_niche() -> None:
    found = outcomes_of(outcome_effect=0.2)
    with_it, without = (found.share[found.outcome == k] for k in (1, 0))
    assert np.exp(np.log(with_it).mean()) == pytest.approx(0.2, rel=0.25)
    ratio = np.exp(np.log(with_it).mean() - np.log(without).mean())
    assert ratio == pytest.approx(4.0, rel=0.35)
    assert outcomes_of(outcome_effect=0.4).share.max() <= 0.5


def test_the_pair_is_raised_together_in_no_domain() -> None:
    config = SimulateConfig(seed=1)
    programmes = plant_programmes(PROGRAMMES, config)
    first, second = draw_outcomes(programmes, config).pair
    effect = programmes.domain_effect
    assert first != second
    assert np.corrcoef(effect.T)[first, second] < -0.3
    assert np.minimum(effect[:, first], effect[:, second]).max() < RAISE / 2


def test_the_niche_has_its_share_and_is_compact() -> None:
    found = outcomes_of(outcome_effect=0.2)
    patient = int(np.argmax(found.share))
    lattice = draw_lattice(random_stream(1, "lattice"), 400)
    niche = found.niche(random_stream(1, "niche"), lattice, patient)
    assert niche.sum() == round(found.share[patient] * 400)
    xy = lattice.spots_um
    apart = np.hypot(*(xy[:, None] - xy).transpose(2, 0, 1))
    touching = (apart > 1) & (apart < 101)
    within = touching[niche][:, niche].sum() / touching[niche].sum()
    assert within > 0.5 > 1.4 * niche.mean()
    activity = np.zeros((400, 24))
    raised = found.raised(activity, niche)
    assert (raised[niche][:, list(found.pair)] == RAISE).all()
    assert raised.sum() == pytest.approx(2 * RAISE * niche.sum())
    assert activity.sum() == 0


def test_without_effect_the_files_do_not_know_the_outcome(pair: dict[float, Path]) -> None:
    off, on = pair[0.0].parent, pair[0.2].parent
    truth = json.loads((off / "truth.json").read_text())
    assert {slide["niche_share"] for slide in truth["slides"].values()} == {0.0}
    assert "niche" not in pd.read_csv(off / "sim001" / "labels.csv")
    for name in ("spatial/tissue_positions.csv", "spatial/scalefactors_json.json"):
        assert (off / "sim001" / name).read_bytes() == (on / "sim001" / name).read_bytes()
    matrix = "filtered_feature_bc_matrix.h5"
    assert (off / "sim001" / matrix).read_bytes() != (on / "sim001" / matrix).read_bytes()


def test_manifest_labels_and_truth_agree(pair: dict[float, Path]) -> None:
    rows = read_manifest(pair[0.2])
    truth = json.loads((pair[0.2].parent / "truth.json").read_text())
    plain = json.loads((pair[0.0].parent / "truth.json").read_text())
    assert {row.outcome for row in rows} == {"0", "1"}
    assert len({(row.patient_id, row.outcome) for row in rows}) == 4
    raised = [f"activity:{name}" for name in truth["niche"]["raised_programmes"]]
    for row in rows:
        planted = truth["slides"][row.slide_id]
        assert row.outcome == str(planted["outcome"])
        assert planted["outcome"] == plain["slides"][row.slide_id]["outcome"]
        labels = pd.read_csv(row.labels)
        niche = labels.pop("niche") == 1.0
        before = pd.read_csv(pair[0.0].parent / row.slide_id / "labels.csv")
        assert niche.mean() == pytest.approx(planted["niche_share"])
        np.testing.assert_allclose(
            labels[raised] - before[raised], RAISE * niche.to_numpy()[:, None] * [1, 1], atol=2e-5
        )
        rest = [column for column in labels if column not in raised]
        pd.testing.assert_frame_equal(labels[rest], before[rest])


def test_an_effect_beyond_its_range_is_refused() -> None:
    with pytest.raises(DataError, match=r"outcome_effect=0\.9 is outside 0 to 0\.4"):
        SimulateConfig(outcome_effect=0.9)
