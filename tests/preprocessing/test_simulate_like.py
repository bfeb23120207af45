"""Cohorts as hard as real sections: knobs, presets, and the table that compares them."""

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pathways import load_pathways
from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.simulate.config import LIKE, random_stream
from preprocessing.simulate.layout import draw_lattice
from preprocessing.simulate.programmes import build_panel, neighbour_matrix, plant_programmes

PROGRAMMES = {f"P{p}": [f"GENE{10 * p + g}" for g in range(10)] for p in range(8)}
SMALL = {"n_spots": 40, "n_genes": 150, "n_programmes": 6, "n_housekeeping": 10, "mpp": 4.0}


@pytest.fixture
def realism(monkeypatch):
    """benchmarks/realism.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("realism")


def test_the_lattice_has_its_pitch_and_the_same_neighbours():
    near, far = (draw_lattice(random_stream(0, "x"), 90, pitch) for pitch in (100.0, 200.0))
    for lattice, pitch in ((near, 100.0), (far, 200.0)):
        gap = np.hypot(*(lattice.spots_um[:, None] - lattice.spots_um).transpose(2, 0, 1))
        assert np.sort(gap, axis=1)[:, 1] == pytest.approx(pitch)
        touching = (gap > 0) & (gap < 1.1 * pitch)
        assert np.array_equal(neighbour_matrix(lattice).toarray() > 0, touching)
    assert far.inside_um.size > 2.5 * near.inside_um.size


def test_levels_of_genes_spread_as_asked():
    config = SimulateConfig(n_genes=8000, n_programmes=6, level_spread=1.2, filler_level=0.5)
    panel = build_panel(plant_programmes(PROGRAMMES, config), config)
    level = {kind: np.log(panel.base[panel.kinds == kind]) for kind in set(panel.kinds)}
    assert level["filler"].std() == pytest.approx(1.2, abs=0.05)
    gap = level["filler"].mean() - level["programme"].mean()
    assert gap == pytest.approx(np.log(0.5), abs=4 * 1.2 / np.sqrt(60))
    assert panel.base.sum() == pytest.approx(1)


def truth_of(folder: Path, **settings) -> dict:
    simulate_cohort(folder, PROGRAMMES, SimulateConfig(**SMALL, **settings))
    return json.loads((folder / "truth.json").read_text())


def test_patients_differ_in_depth_and_their_slides_do_not(tmp_path):
    truth = truth_of(tmp_path, n_slides=6, n_patients=3, depth_shift=0.0, depth_patient=0.8)
    slides = pd.DataFrame(truth["slides"]).T
    shift = slides.groupby("patient_id").log_depth_shift.unique()
    assert [len(values) for values in shift] == [1, 1, 1]
    assert np.ptp([values[0] for values in shift]) > 0.2


def test_a_patient_with_its_own_texture_is_read_by_nobody_else(tmp_path):
    shared, half, own = (
        truth_of(tmp_path / str(share), n_slides=2, n_patients=2, texture_shift=share)[
            "image_correlation_ceiling"
        ]
        for share in (0.0, 0.5, 1.0)
    )
    assert set(own.values()) == {0.0}
    for name, best in shared.items():
        assert half[name] == pytest.approx(best * np.sqrt(0.5), abs=2e-4)
    labels = [(tmp_path / s / "sim001" / "labels.csv").read_bytes() for s in ("0.0", "0.5", "1.0")]
    assert labels[0] == labels[1] == labels[2]


@pytest.mark.parametrize("change", [{"pitch_um": 5}, {"texture_shift": 1.5}, {"filler_level": -1}])
def test_knobs_out_of_range_are_refused(change):
    with pytest.raises(DataError, match=f"{next(iter(change))}=.* is outside"):
        SimulateConfig(**change)


def test_presets_are_settings_and_can_be_changed():
    for name, settings in LIKE.items():
        config = SimulateConfig.like(name)
        assert all(getattr(config, key) == value for key, value in settings.items())
        assert SimulateConfig.like(name, n_spots=90).n_spots == 90
    with pytest.raises(DataError, match="'her2'; choose one of her2st, mob; did you mean 'her2st'"):
        SimulateConfig.like("her2")


# ------------------------------------------------------------------ the table
def test_counts_like_her2st_are_as_sparse_and_as_smooth(realism, tmp_path):
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig.like("her2st", n_slides=1, n_patients=1, mpp=4.0, depth_patient=0.0)
    manifest = simulate_cohort(tmp_path / "cohort", programmes, config)
    assert not prepare(manifest, tmp_path / "stores", patch=PatchConfig(200, 16)).failed
    (section,) = realism.read(tmp_path / "stores")
    assert 0.65 < 1 - section.counts.nnz / np.prod(section.counts.shape) < 0.85
    assert 2500 < np.median(section.depth) < 7500
    tested = np.argsort(-section.counts.getnnz(axis=0))[: realism.TESTED]
    middle, high = np.quantile(realism.moran(section, tested), (0.5, 0.9))
    assert middle < 0.15
    assert 0.1 < high < 0.35
    column = realism.statistics([section])
    assert column["sections, patients"] == "1, 1"
    assert "P50 by ridge, held-out patient" not in column


def section_of(realism, counts: np.ndarray, xy_um: np.ndarray | None = None):
    xy = np.indices((20, len(counts) // 20)).reshape(2, -1).T * 100.0 if xy_um is None else xy_um
    return realism.Section("a", "p", sparse.csr_matrix(counts), xy, None)


def test_moran_against_a_slow_one(realism):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (60, 2))
    section = section_of(realism, rng.poisson(3.0, (60, 5)), xy)
    near = np.argsort(np.hypot(*(xy[:, None] - xy).transpose(2, 0, 1)), axis=1)[:, 1:7]
    graph = realism.KNNGraph(k=6).build(xy).matrix().toarray() > 0
    assert graph[np.arange(60)[:, None], near].mean() > 0.8  # and the pairs that are mutual
    z = (section.expression - section.expression.mean(0)) / section.expression.std(0)
    slow = [
        np.mean([z[s, g] * np.mean([z[n, g] for n in np.flatnonzero(graph[s])]) for s in range(60)])
        for g in range(5)
    ]
    np.testing.assert_allclose(realism.moran(section, np.arange(5)), slow)


def test_dispersion_and_reliability_are_found_again(realism):
    rng = np.random.default_rng(1)
    level = np.full((1000, 30), 200.0)
    noisy = rng.poisson(level * rng.gamma(1 / 0.3, 0.3, level.shape))
    assert realism.dispersion(section_of(realism, noisy)) == pytest.approx(0.3, abs=0.04)
    poisson = section_of(realism, rng.poisson(level))
    assert realism.dispersion(poisson) == pytest.approx(0.0, abs=0.01)
    columns = np.arange(30)
    assert abs(realism.reliability(poisson, columns)) < 0.05
    assert realism.reliability(section_of(realism, noisy), columns) > 0.9


def test_recall_and_shares_of_variance_have_closed_forms(realism):
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((200, 8))
    assert realism.recall(rows, rows) == 1.0
    assert realism.recall(rng.standard_normal((200, 8)), rows) == pytest.approx(0.1, abs=0.06)
    assert realism.recall(-rows, rows) == 0.0
    parts = [(f"p{k}", rng.standard_normal((2000, 3)) + shift) for k, shift in enumerate((-1, 1))]
    assert realism.between(parts) == pytest.approx(0.5, abs=0.03)
    assert realism.between([("p", parts[0][1]), ("q", parts[0][1])]) == pytest.approx(0, abs=1e-9)


def test_ridge_reads_a_picture_that_says_all_and_not_one_that_says_nothing(realism):
    rng = np.random.default_rng(3)
    activity = rng.standard_normal((400, 4))
    counts = rng.poisson(20 * np.exp(0.5 * activity @ rng.standard_normal((4, 80)) * 0.5))
    xy = rng.uniform(0, 2000, (400, 2))

    def sections(feature):
        parts = [slice(0, 200), slice(200, 400)]
        return [
            realism.Section(str(k), f"p{k}", sparse.csr_matrix(counts[p]), xy[p], feature[p])
            for k, p in enumerate(parts)
        ]

    seeing = realism.held_out(sections(np.tile(activity, 60)))
    blind = realism.held_out(sections(rng.standard_normal((400, 240))))
    assert min(seeing["pearson"]) > 0.5 > 0.15 > max(np.abs(blind["pearson"]))
    assert min(seeing["recall"]) > 0.5 > 0.25 > max(blind["recall"])
    first = sections(np.tile(activity, 60))[0]
    assert realism.within(first, np.arange(50)) > 0.5
