"""Is this the picture of these spots: parts against slow ones, planted faults, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix

from preprocessing.graphs import KNNGraph, morans_i
from preprocessing.image_transform import TURNS, moved, turn_matrix
from preprocessing.manifest import read_manifest
from preprocessing.patches import PatchConfig
from preprocessing.registration import (
    Agreement,
    Registration,
    register,
    store_registration,
    verdict,
)
from preprocessing.registration.agreement import _explained, _spectral_draws
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.store import SlidePicture, SlideStore

PITCH = 16.0


def section(seed: int = 0) -> tuple[np.ndarray, np.ndarray, csr_matrix]:
    """Picture (h, w, 3) of a tissue on glass, spots (S, 2) on it, and counts that follow it."""
    rng = np.random.default_rng(seed)
    h, w = 420, 380
    y, x = np.mgrid[:h, :w]
    radius = 130 + 25 * np.cos(3 * np.arctan2(y - 200, x - 180) + 1)
    tissue = np.hypot(x - 180, (y - 200) * 0.85) < radius
    fields = np.stack([gaussian_filter(rng.normal(size=(h, w)), 26) for _ in range(3)])
    fields /= fields.std(axis=(1, 2), keepdims=True)
    colour = np.stack([170 + 30 * fields[0], 110 + 30 * fields[1], 170 + 25 * fields[2]], axis=-1)
    colour += rng.normal(0, 8, colour.shape)
    picture = np.where(tissue[..., None], colour, 243).clip(0, 255).astype(np.uint8)
    grid = np.stack(np.meshgrid(np.arange(20, w, PITCH), np.arange(20, h, PITCH)), -1).reshape(
        -1, 2
    )
    xy = grid[tissue[grid[:, 1].astype(int), grid[:, 0].astype(int)]]
    at = fields[:, xy[:, 1].astype(int), xy[:, 0].astype(int)]
    load = rng.normal(0, 0.6, (3, 60))
    return picture, xy, csr_matrix(rng.poisson(4 * np.exp(at.T @ load)))


def found(
    picture: np.ndarray, xy: np.ndarray, counts: csr_matrix, down: float = 2.0
) -> Registration:
    size = (int(picture.shape[1] * down), int(picture.shape[0] * down))
    return register(SlidePicture(size, picture, down), xy * down, counts)


def test_a_right_slide_passes_and_says_how_sure_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, search = [], verdict._search

    def seen(agreement: Agreement) -> tuple:
        searched.append(search(agreement))
        return searched[0]

    monkeypatch.setattr(verdict, "_search", seen)
    result = found(*section())
    assert result.gain == searched[0][1]
    assert result.p < 0.05  # hardly another place agrees as well
    assert (result.verdict, result.correction, result.fix) == ("fits", "", "")
    assert result.z > 5
    assert result.outline > 0.8
    assert result.pitch_px == pytest.approx(2 * PITCH)
    assert "is the picture of these spots" in result.message


@pytest.mark.parametrize("name", ["flip_x", "rot90", "transverse"])
def test_a_turned_picture_is_found_with_its_word(name: str) -> None:
    picture, xy, counts = section()
    turned = (turn_matrix(name, (0, 0))[:2, :2]).astype(int)
    swap = np.swapaxes(picture, 0, 1) if turned[0, 0] == 0 else picture
    signs = turned.sum(axis=1)  # of x, of y
    planted = swap[:: signs[1], :: signs[0]]
    result = found(planted, xy, counts)
    assert (result.verdict, result.correction) == ("moved", name)
    assert set(TURNS) > {name}
    assert name in result.finding("s").fix


def test_shifts_are_found_and_undone_by_their_correction() -> None:
    picture, xy, counts = section()
    for shift in ((2, 0), (-3, 4)):
        result = found(picture, xy + PITCH * np.array(shift), counts)
        assert result.verdict == "moved"
        back = moved(2.0 * (xy + PITCH * np.array(shift)), result.matrix) / 2
        assert np.hypot(*(back - xy).T).max() < 0.5 * PITCH
        assert result.correction.startswith("shift:")


def test_a_correction_includes_what_was_done_before() -> None:
    picture, xy, counts = section()
    size = (2 * picture.shape[1], 2 * picture.shape[0])
    before = turn_matrix("rot180", size)
    result = register(SlidePicture(size, picture, 2.0), moved(2 * xy, before), counts, before)
    assert result.verdict == "moved"
    assert np.abs(result.matrix @ before - np.eye(3)).max() < 1e-9
    assert result.correction == "shift:0 0"


def test_another_slide_and_shuffled_counts_warn() -> None:
    picture, xy, counts = section()
    other = section(1)[0][::-1]
    strange = found(np.ascontiguousarray(other), xy, counts)
    assert strange.warns
    order = np.random.default_rng(0).permutation(len(xy))
    shuffled = found(picture, xy, counts[order])
    assert shuffled.verdict == "shuffled"
    assert min(strange.p, shuffled.p) > 0.1
    assert "order" in shuffled.message


def test_it_says_when_it_cannot_tell() -> None:
    picture, xy, counts = section()
    few = found(picture, xy[:40], counts[:40])
    dark = found(picture // 4, xy, counts)
    panel = found(picture, xy, counts[:, :10])
    assert {few.verdict, dark.verdict, panel.verdict} == {"unknown"}
    for result, word in ((few, "40 spots"), (dark, "dark"), (panel, "10 genes")):
        assert word in result.message
        assert result.finding("s").level == "PASS"


def test_agreement_does_not_care_for_the_scale_of_counts() -> None:
    picture, xy, counts = section()
    none = np.empty((0, 2))
    one, three = (Agreement(picture, xy, counts * k, none) for k in (1, 3))
    place = np.eye(3)[:2][None]
    assert one.outline(place) == pytest.approx(three.outline(place))
    assert one.moran == pytest.approx(three.moran, abs=0.05)


def test_the_outline_is_the_share_on_tissue_less_that_of_the_ring() -> None:
    picture, xy, counts = section()
    agreement = Agreement(picture, xy, counts, np.empty((0, 2)))
    far = np.array([[[1.0, 0, 3000], [0, 1, 0]]])
    assert agreement.outline(far)[0] == pytest.approx(-0.5)  # nothing on tissue, the ring unknown
    assert agreement.outline(np.eye(3)[:2][None])[0] > 0.8
    assert agreement.distance(far)[0] == pytest.approx(3000 / PITCH)


def test_what_ridge_explains_against_a_plain_solution() -> None:
    rng = np.random.default_rng(0)
    maps, values = rng.normal(size=(2, 30, 4)), rng.normal(size=(30, 3))
    for place in range(2):
        x = maps[place]
        fitted = x @ np.linalg.inv(x.T @ x + 5 * np.eye(4)) @ x.T @ values
        assert _explained(maps, values)[place] == pytest.approx((values * fitted).sum())


def test_draws_are_as_smooth_and_as_correlated_but_elsewhere() -> None:
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    graph = KNNGraph(k=6).build(xy)
    trend = np.linalg.qr(np.stack([np.ones(144), *xy.T], axis=1))[0]
    values = np.stack([np.sin(xy[:, 0]) + np.cos(xy[:, 1]), np.cos(xy[:, 0] * 0.7)], axis=1)
    values -= trend @ (trend.T @ values)
    draws = _spectral_draws(values, graph.matrix().toarray(), trend, rng)
    assert np.abs(trend.T @ draws).max() < 1e-9
    assert np.allclose(draws.transpose(0, 2, 1) @ draws, values.T @ values)
    smooth = morans_i(values, graph)
    assert (
        np.abs(np.stack([morans_i(d, graph) for d in draws[:9]]).mean(axis=0) - smooth).max() < 0.1
    )
    assert np.abs([np.corrcoef(d[:, 0], values[:, 0])[0, 1] for d in draws]).mean() < 0.6


def test_a_planted_turn_is_warned_of_and_corrected_only_when_asked(tmp_path: Path) -> None:
    programmes = {f"P{p}": [f"GENE{10 * p + g}" for g in range(10)] for p in range(8)}
    config = SimulateConfig(
        n_slides=1, n_patients=1, n_spots=150, n_genes=150, n_programmes=8,
        n_housekeeping=10, misregister="rot180", seed=3,
    )  # fmt: skip
    manifest = simulate_cohort(tmp_path / "cohort", programmes, config)
    row = read_manifest(manifest)[0]
    patch = PatchConfig(100.0, 8)
    ways = {"given": {}, "fixed": {"fix_registration": True}, "column": {}}
    stores = {}
    for way, asked in ways.items():
        told = replace(row, image_transform="rot180") if way == "column" else row
        report = prepare([told], tmp_path / way, patch=patch, **asked)
        assert not report.failed, str(report)
        stores[way] = SlideStore(tmp_path / way / f"{row.slide_id}.h5")
    given, fixed, column = (store_registration(store) for store in stores.values())
    assert (given.verdict, given.correction) == ("moved", "rot180")
    assert (fixed.verdict, column.verdict) == ("fits", "fits")
    assert [store.correction for store in stores.values()] == ["", "rot180", ""]
    assert "--fix-registration" in " ".join(stores["fixed"].attrs["notes"])
    assert np.allclose(stores["fixed"].xy_px0, stores["column"].xy_px0)
    assert np.allclose(stores["fixed"].image_transform, stores["column"].image_transform)
    assert stores["given"].image_transform is None
    again = prepare([row], tmp_path / "fixed", patch=patch, fix_registration=True)
    assert again.rows[0].status == "skipped"
    for store in stores.values():
        store.close()
