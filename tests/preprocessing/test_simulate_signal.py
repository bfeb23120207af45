"""What the simulated image says about expression: much at the default signal, nothing at 0."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import stats
from sklearn.linear_model import RidgeCV

from preprocessing.simulate import SimulateConfig, simulate_cohort

PROGRAMMES = {f"P{p:02d}": [f"GENE{(9 * p + g) % 260}" for g in range(12)] for p in range(26)}
SIZE = {"n_slides": 6, "n_patients": 3, "n_spots": 130, "n_genes": 400, "seed": 5}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    return simulate_cohort(folder, PROGRAMMES, SimulateConfig(**SIZE)).parent


@pytest.fixture(scope="module")
def blind(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blind")
    return simulate_cohort(folder, PROGRAMMES, SimulateConfig(**SIZE, signal=0.0)).parent


def _patch_features(root: Path, row) -> np.ndarray:
    """Colour means and spreads and a gradient of each 112 um patch, z-scored per slide."""
    picture = tifffile.imread(root / row.image, key=0).astype(np.float32)
    positions = pd.read_csv(root / row.slide_id / "spatial" / "tissue_positions.csv")
    spots = positions.query("in_tissue == 1")
    centres = spots[["pxl_row_in_fullres", "pxl_col_in_fullres"]].to_numpy().astype(int)
    features = []
    for r, c in centres:
        patch = picture[r - 56 : r + 56, c - 56 : c + 56]
        grey = patch.mean(axis=2)
        steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
        dark = [(patch[..., 0] < level).mean() for level in (110, 150)]
        features.append([*patch.mean((0, 1)), *patch.std((0, 1)), *steps, *dark])
    table = np.array(features)
    return (table - table.mean(axis=0)) / table.std(axis=0)


def _activity(root: Path, slide: str) -> np.ndarray:
    return pd.read_csv(root / slide / "labels.csv").filter(like="activity:").to_numpy()


def _held_out_correlation(root: Path) -> float:
    """Mean within-slide correlation of ridge predictions and activity, leave one patient out."""
    rows = pd.read_csv(root / "manifest.csv")
    x = [_patch_features(root, row) for row in rows.itertuples()]
    y = [stats.zscore(_activity(root, slide)) for slide in rows.slide_id]
    patient = rows.patient_id.to_numpy()
    r = []
    for held_out in np.unique(patient):
        train = np.flatnonzero(patient != held_out)
        model = RidgeCV(np.logspace(0, 3, 4))
        model.fit(np.concatenate([x[i] for i in train]), np.concatenate([y[i] for i in train]))
        for i in np.flatnonzero(patient == held_out):
            r.append((stats.zscore(model.predict(x[i])) * y[i]).mean(axis=0))
    return float(np.mean(r))


def test_the_image_shows_the_programmes(seeing):
    assert _held_out_correlation(seeing) > 0.35


def test_without_signal_the_image_says_nothing(blind):
    assert abs(_held_out_correlation(blind)) < 0.1
    truth = json.loads((blind / "truth.json").read_text())
    assert truth["image_visible_programmes"] == []


def test_signal_changes_the_image_only(seeing, blind):
    for name in ("filtered_feature_bc_matrix.h5", "labels.csv", "spatial/tissue_positions.csv"):
        assert (seeing / "sim001" / name).read_bytes() == (blind / "sim001" / name).read_bytes()
    image = "slides/sim001.tif"
    assert (seeing / image).read_bytes() != (blind / image).read_bytes()
