"""Planted registration faults: the picture lies wrongly, everything else is as it was."""

import json

import numpy as np
import pytest
import tifffile

from preprocessing.errors import DataError
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.simulate.config import TURNS
from preprocessing.simulate.texture import lay_wrongly

PROGRAMMES = {f"P{p}": [f"GENE{10 * p + g}" for g in range(10)] for p in range(8)}
UNTOUCHED = ("filtered_feature_bc_matrix.h5", "labels.csv", "spatial/tissue_positions.csv")
ORACLES = {
    "flip_x": np.fliplr,
    "flip_y": np.flipud,
    "rot90": np.rot90,
    "rot180": lambda p: np.rot90(p, 2),
    "rot270": lambda p: np.rot90(p, 3),
    "transpose": lambda p: np.swapaxes(p, 0, 1),
    "transverse": lambda p: np.rot90(np.swapaxes(p, 0, 1), 2),
}


def noise(height: int = 30, width: int = 47) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 240, (height, width, 3)).astype(np.uint8)


def assert_carried(before: np.ndarray, after: np.ndarray, matrix: np.ndarray) -> int:
    """Every pixel that stays in the frame lies where the matrix says; returns how many stay."""
    y, x = np.indices(before.shape[:2])
    at = np.stack([x + 0.5, y + 0.5, np.ones_like(x)]).reshape(3, -1)
    column, row, _ = np.floor(np.asarray(matrix) @ at).astype(int)
    inside = (row >= 0) & (row < after.shape[0]) & (column >= 0) & (column < after.shape[1])
    assert np.array_equal(after[row[inside], column[inside]], before.reshape(-1, 3)[inside])
    return int(inside.sum())


@pytest.mark.parametrize("name", TURNS)
def test_turns_are_those_of_their_names(name):
    picture = noise()
    turned, matrix = lay_wrongly(picture, TURNS[name], (0, 0))
    assert np.array_equal(turned, ORACLES[name](picture))
    assert assert_carried(picture, turned, matrix) == picture[..., 0].size


@pytest.mark.parametrize("shift", [(0, 0), (5, -3), (-12, 29), (47, 0), (0, -90)])
def test_a_shifted_picture_leaves_glass_behind(shift):
    picture = noise()
    moved, matrix = lay_wrongly(picture, (False, 1, 1), shift)
    kept = assert_carried(picture, moved, matrix)
    assert kept == max(0, 47 - abs(shift[0])) * max(0, 30 - abs(shift[1]))
    assert (moved == 243).all(axis=2).sum() == picture[..., 0].size - kept


def simulated(out, fault: str):
    config = SimulateConfig(
        n_slides=3,
        n_patients=2,
        n_spots=40,
        n_genes=120,
        n_programmes=6,
        n_housekeeping=10,
        mpp=4.0,
        misregister=fault,
    )
    simulate_cohort(out, PROGRAMMES, config)
    truth = json.loads((out / "truth.json").read_text())["slides"]
    return truth, {name: tifffile.imread(out / "slides" / f"{name}.tif") for name in truth}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    folder = tmp_path_factory.mktemp("right")
    return folder, *simulated(folder, "")


@pytest.mark.parametrize("fault", ["rot90", "shift:2", "other"])
def test_only_the_pictures_change(fault, right, tmp_path):
    folder, before, pictures = right
    truth, laid = simulated(tmp_path, fault)
    for name in before:
        assert np.array_equal(before[name]["image_transform"], np.eye(3))
        for file in UNTOUCHED:
            assert (folder / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
        matrix = truth[name]["image_transform"]
        if fault == "other":
            other = truth[name]["picture_of"]
            assert truth[other]["patient_id"] != truth[name]["patient_id"]
            assert matrix is None
            assert np.array_equal(laid[name], pictures[other])
        elif fault == "shift:2":
            assert np.hypot(matrix[0][2], matrix[1][2]) * 4.0 == pytest.approx(200, abs=4)
            assert laid[name].shape == pictures[name].shape
        else:
            assert laid[name].shape == np.rot90(pictures[name]).shape
            loss = np.abs(laid[name].astype(float) - np.rot90(pictures[name]))
            assert loss.mean() < 4  # JPEG
    assert (folder / "manifest.csv").read_bytes() == (tmp_path / "manifest.csv").read_bytes()


def test_one_patient_takes_its_other_slide():
    assert SimulateConfig(n_slides=2, n_patients=1, misregister="other").n_slides == 2
    with pytest.raises(DataError, match="raise n_slides"):
        SimulateConfig(n_slides=1, n_patients=1, misregister="other")


@pytest.mark.parametrize("fault", ["rot9", "shift", "shift:", "shift:far", "shift:0", "shift:99"])
def test_unknown_faults_are_refused(fault):
    with pytest.raises(DataError, match=r"is none of flip_x, .*shift:N with N from 0\.5 to 20"):
        SimulateConfig(misregister=fault)
