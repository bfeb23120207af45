"""Parts of the simulator against closed forms: negative binomial, bleed, stamps, panel, fields."""

import numpy as np
import pytest
from scipy import sparse, stats

from preprocessing.errors import DataError
from preprocessing.simulate.config import SimulateConfig, random_stream
from preprocessing.simulate.layout import draw_domains, draw_lattice, gaussian_field
from preprocessing.simulate.programmes import (
    build_panel,
    draw_activity,
    draw_counts,
    gene_shares,
    leak_matrix,
    neighbour_matrix,
    plant_programmes,
    texture_map,
    visibility,
)
from preprocessing.simulate.texture import Stamps, stamp

PROGRAMMES = {f"P{p}": [f"G{p}_{g}" for g in range(10)] for p in range(12)}
SMALL = SimulateConfig(n_programmes=12, n_genes=300, n_housekeeping=40)


def _rng(index: int = 0) -> np.random.Generator:
    return random_stream(11, "test", index)


def test_counts_are_negative_binomial_without_bleed():
    mean = np.array([3.0, 57.0, 240.0])
    phi = np.array([0.3, 0.3, 0.03])
    no_leak = sparse.csr_matrix(sparse.eye_array(6000))
    counts = draw_counts(_rng(1), np.tile(mean, (6000, 1)), phi, no_leak).toarray()
    np.testing.assert_allclose(counts.mean(axis=0), mean, rtol=0.05)
    np.testing.assert_allclose(counts.var(axis=0), mean + phi * mean**2, rtol=0.12)
    expected = stats.nbinom(1 / 0.3, 1 / (1 + 0.3 * mean[0])).pmf(np.arange(12))
    seen = np.bincount(counts[:, 0], minlength=12)[:12] / 6000
    np.testing.assert_allclose(seen, expected, atol=0.02)


def test_zero_dispersion_is_poisson_and_overdispersion_exceeds_it():
    no_leak = sparse.csr_matrix(sparse.eye_array(3000))
    expected, phi = np.full((3000, 2), 20.0), np.array([0.0, 0.3])
    counts = draw_counts(_rng(2), expected, phi, no_leak).toarray()
    poisson, overdispersed = counts.var(axis=0) / counts.mean(axis=0)
    assert poisson == pytest.approx(1.0, abs=0.08)
    assert overdispersed == pytest.approx(1 + 0.3 * 20, rel=0.1)


def test_bleed_moves_expression_to_the_neighbours():
    lattice = draw_lattice(_rng(), 200)
    neighbours = neighbour_matrix(lattice).toarray()
    source = int(np.argmax(neighbours.sum(axis=1)))
    expected = np.zeros((200, 1))
    expected[source] = 60_000
    leak = leak_matrix(lattice, 0.3)
    counts = draw_counts(_rng(3), expected, np.zeros(1), leak).toarray()[:, 0]
    assert counts[source] == pytest.approx(0.7 * 60_000, rel=0.03)
    np.testing.assert_allclose(counts[neighbours[source] > 0], 0.05 * 60_000, rtol=0.08)
    far = (neighbours[source] == 0) & (np.arange(200) != source)
    assert counts[far].sum() == 0


def test_neighbours_match_the_distances():
    lattice = draw_lattice(_rng(4), 150)
    xy = lattice.spots_um
    apart = np.hypot(*(xy[:, None] - xy).transpose(2, 0, 1))
    np.testing.assert_array_equal(neighbour_matrix(lattice).toarray(), (apart > 1) & (apart < 101))


@pytest.mark.parametrize("n_spots", [20, 137, 1500])
def test_lattice_has_the_spots_asked_for_well_inside_the_picture(n_spots):
    lattice = draw_lattice(_rng(n_spots), n_spots)
    assert lattice.in_tissue.sum() == n_spots
    xy = lattice.spots_um
    assert xy.min() >= 100
    assert (xy <= np.array(lattice.size_um) - 100).all()
    assert (lattice.inside_um[lattice.spot_cells] > 0).all()


def test_gaussian_field_is_standard_and_as_smooth_as_asked():
    field = gaussian_field(_rng(5), (400, 400), 100.0)
    assert field.mean() == pytest.approx(0, abs=0.2)
    assert field.std() == pytest.approx(1, abs=0.2)
    lag = 5
    r = np.corrcoef(field[:, lag:].ravel(), field[:, :-lag].ravel())[0, 1]
    assert r == pytest.approx(np.exp(-((lag * 20) ** 2) / (4 * 100**2)), abs=0.06)


def test_activity_has_the_planted_covariance():
    programmes = plant_programmes(PROGRAMMES, SMALL)
    np.testing.assert_allclose(np.diag(programmes.covariance), 1.0, atol=1e-9)
    drawn = []
    for i in range(30):
        lattice = draw_lattice(_rng(i), 200)
        domains = draw_domains(_rng(100 + i), lattice)
        drawn.append(draw_activity(_rng(200 + i), programmes, lattice, domains))
    cov = np.cov(np.concatenate(drawn).T)
    assert np.corrcoef(cov.ravel(), programmes.covariance.ravel())[0, 1] > 0.95


def test_texture_parameters_have_unit_variance_and_the_stated_ceiling():
    programmes = plant_programmes(PROGRAMMES, SMALL)
    mapping = texture_map(_rng(6), programmes, 6)
    cov = programmes.covariance
    np.testing.assert_allclose(np.diag(mapping.T @ cov @ mapping), 1.0)
    a, b = (_rng(i).multivariate_normal(np.zeros(12), cov, 40_000) for i in (7, 8))
    image = (np.sqrt(0.6) * a + np.sqrt(0.4) * b) @ mapping
    fit = image @ np.linalg.lstsq(image, a, rcond=None)[0]
    seen = [np.corrcoef(fit[:, p], a[:, p])[0, 1] for p in range(12)]
    np.testing.assert_allclose(seen, list(visibility(programmes, mapping, 0.6).values()), atol=0.02)
    assert set(visibility(programmes, mapping, 0.0).values()) == {0.0}


def test_panel_blocks_and_closed_form_shares():
    taken = PROGRAMMES | {"P0": ["HKG1", "BG2", "HK1", "HK2", "G0_4", "G0_5"]}
    programmes = plant_programmes(taken, SMALL)
    panel = build_panel(programmes, SMALL)
    assert len(set(panel.names)) == len(set(panel.ids)) == 300
    assert panel.base.sum() == pytest.approx(1)
    assert {"HKG1", "BG2"} <= set(panel.names[panel.kinds == "programme"])
    assert (panel.kinds == "housekeeping").sum() == 40
    activity = np.zeros((2, 12))
    activity[1, 3] = 2.0
    share = gene_shares(panel, activity, patient=0)
    member = np.isin(panel.names, programmes.genes["P3"])
    ratio = share[1] / share[0]
    np.testing.assert_allclose(ratio[~member], ratio[~member][0])
    np.testing.assert_allclose(
        ratio[member] / ratio[~member][0], np.exp(2 * panel.effect[3, member])
    )


def test_a_full_panel_keeps_equal_shares_of_every_programme():
    config = SimulateConfig(n_programmes=12, n_genes=124, n_housekeeping=40)
    programmes = plant_programmes(PROGRAMMES, config)
    assert {len(genes) for genes in programmes.genes.values()} == {7}
    assert set(programmes.left_out.values()) == {3}
    small = PROGRAMMES | {"TINY": ["X", "Y"], "TWICE": ["X"] * 9}
    assert plant_programmes(small, config).too_small == ("TINY", "TWICE")
    with pytest.raises(DataError, match="need 60; raise n_genes"):
        plant_programmes(PROGRAMMES, SimulateConfig(n_programmes=12, n_genes=99, n_housekeeping=40))


def test_stamps_match_a_slow_drawing():
    rng = _rng(9)
    stamps = Stamps(
        y=rng.uniform(-3, 43, 25),
        x=rng.uniform(-3, 53, 25),
        semi_axes=rng.uniform(1.5, 6, (25, 2)),
        angle=rng.uniform(0, np.pi, 25),
        value=rng.uniform(0.5, 1, 25),
    )
    slow = np.zeros((40, 50))
    for r in range(40):
        for c in range(50):
            for n in range(25):
                dy, dx = r + 0.5 - stamps.y[n], c + 0.5 - stamps.x[n]
                cos, sin = np.cos(stamps.angle[n]), np.sin(stamps.angle[n])
                a, b = stamps.semi_axes[n]
                distance = np.hypot((cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b)
                cover = min(1.0, max(0.0, (1 - distance) * min(a, b) + 0.5))
                slow[r, c] = max(slow[r, c], cover * stamps.value[n])
    np.testing.assert_allclose(stamp((40, 50), stamps), slow, atol=1e-5)


def test_random_streams_are_independent_by_name_and_index():
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (0, "a", 0)]
    draws = [random_stream(*key).random(4) for key in keys]
    np.testing.assert_array_equal(draws[0], draws[4])
    assert len({d.tobytes() for d in draws}) == 4
