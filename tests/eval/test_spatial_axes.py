"""Spatial axes: equal to a loop, planted smoothness comes first, linear maps change nothing."""

import numpy as np
import pytest
from scipy.linalg import eig
from scipy.spatial import cKDTree

from eval.errors import FoldError
from eval.tasks.domains import spatial_axes

SIDE = 20


def grid(side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Positions (side^2, 2) of a square grid and its 4-neighbourhoods, padded with -1 at edges."""
    xy = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    distance, near = cKDTree(xy).query(xy, 5)
    return xy.astype(float), np.where(distance < 1.1, near, -1)[:, 1:]


def mixture(seed: int = 0, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A rotated embedding (side^2, 6), one planted wave among wider white noise; the wave."""
    xy, _ = grid(side)
    n_dims = 6
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * xy[:, 0] / side)
    rows = 3.0 * rng.standard_normal((len(xy), n_dims))
    rows[:, 0] = wave + 0.1 * rng.standard_normal(len(xy))
    return rows @ np.linalg.qr(rng.standard_normal((n_dims, n_dims)))[0], wave


def loop(rows: np.ndarray, near: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Both covariances spot by spot, the general eigenproblem; axes (S, C) and their w (C,)."""
    n_dims, mean = rows.shape[1], rows.mean(axis=0)
    whole, noise, n_noise = np.zeros((n_dims, n_dims)), np.zeros((n_dims, n_dims)), 0
    for spot in range(len(rows)):
        whole += np.outer(rows[spot] - mean, rows[spot] - mean) / len(rows)
        around = [n for n in near[spot] if n >= 0]
        if around:
            rest = rows[spot] - rows[around].mean(axis=0)
            noise += np.outer(rest, rest)
            n_noise += 1
    noise /= n_noise
    ratio, axes = eig(whole, noise)
    order = np.argsort(-ratio.real)[:n_components]
    axes = axes.real[:, order]
    axes = axes / np.sqrt(np.einsum("dc,de,ec->c", axes, noise, axes))
    return (rows - mean) @ axes, ratio.real[order]


def same_sign(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return found * np.sign((found * expected).sum(axis=0))


def test_equals_a_loop_over_spots_also_with_lonely_spots() -> None:
    rows, _ = mixture()
    near = grid()[1]
    near[[0, 7, 55]] = -1
    expected, ratio = loop(rows, near, 4)
    found = spatial_axes(rows, near, 4)
    np.testing.assert_allclose(same_sign(found, expected), expected, atol=1e-8)
    np.testing.assert_allclose(found.var(axis=0), ratio, rtol=1e-8)
    assert (np.diff(ratio) < 0).all()


def test_a_planted_wave_is_the_first_axis_and_white_noise_has_its_known_ratio() -> None:
    rows, wave = mixture(side=50)
    near = grid(50)[1]
    found = spatial_axes(rows, near, 6)
    assert abs(np.corrcoef(found[:, 0], wave)[0, 1]) > 0.98
    assert abs(np.corrcoef(rows.T, wave)[-1, :-1]).max() < 0.5
    # white noise of variance 1 minus a mean of k neighbours has variance 1 + 1/k
    expected = 1 / (1 + np.mean(1 / (near >= 0).sum(axis=1)))
    np.testing.assert_allclose(found[:, 1:].var(axis=0).mean(), expected, rtol=0.03)
    # the wave has variance 1/2; its noise is 0.01 (1 + 1/4), as a slope is the mean of its sides
    assert 0.5 / 0.0125 * 0.9 < found[:, 0].var() < 0.51 / 0.0125 * 1.1


@pytest.mark.parametrize("seed", range(5))
def test_an_invertible_linear_map_and_a_shift_change_nothing_but_signs(seed: int) -> None:
    rows, _ = mixture(seed=seed)
    rng = np.random.default_rng(seed)
    turn, back = (np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(2))
    moved = rows @ turn @ np.diag(np.logspace(-2, 1, 6)) @ back + 7
    near = grid()[1]
    expected = spatial_axes(rows, near, 3)
    found = spatial_axes(moved, near, 3)
    np.testing.assert_allclose(same_sign(found, expected), expected, atol=1e-5)


def test_repeated_and_constant_dimensions_add_no_axis() -> None:
    rows, _ = mixture()
    near = grid()[1]
    wide = np.column_stack([rows, rows[:, :3] @ np.ones((3, 2)), np.full(len(rows), 4.0)])
    expected, found = spatial_axes(rows, near, 15), spatial_axes(wide, near, 15)
    assert found.shape == expected.shape == (SIDE**2, 6)
    np.testing.assert_allclose(same_sign(found, expected), expected, atol=1e-6)


def test_an_axis_without_noise_is_first_and_finite() -> None:
    ring = np.column_stack([(np.arange(6) + 1) % 6, (np.arange(6) - 1) % 6])
    near = np.vstack([ring, ring + 6])
    halves = np.repeat([0.0, 1.0], 6)
    rows = np.column_stack([halves, np.random.default_rng(0).standard_normal(12)])
    found = spatial_axes(rows, near, 1)[:, 0]
    assert abs(np.corrcoef(found, halves)[0, 1]) > 1 - 1e-9
    assert found.std() == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("rows", "near", "size", "told"),
    [
        (np.ones((1, 3)), np.array([[-1]]), 2, "found 1 spots .* leave the slide out"),
        (np.eye(3), np.array([[1], [0], [0]]), 0, "0 components .* ask for more components"),
        (np.eye(5)[:, :2], np.full((5, 4), -1), 2, "found 0 spots .* build the spatial graph"),
        (np.eye(5)[:, :2], np.empty((5, 0), int), 2, "found 0 spots .* build the spatial graph"),
        (np.eye(9)[:, :3], np.arange(9)[:, None], 2, "9 spots .* for 3 dimensions; expected 4"),
        (np.full((7, 3), 0.1), np.arange(7)[:, None], 2, "at all 7 spots.*leave this embedding"),
    ],
)
def test_degenerate_input_is_refused_with_a_remedy(rows, near, size, told) -> None:
    with pytest.raises(FoldError, match=told):
        spatial_axes(rows, near, size)
