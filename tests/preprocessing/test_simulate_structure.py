"""The knobs of structure: contiguity of the domains, overlap of the programmes."""

import numpy as np
import pytest

from preprocessing.errors import DataError
from preprocessing.simulate.config import SimulateConfig, random_stream
from preprocessing.simulate.layout import draw_domains, draw_lattice, scatter
from preprocessing.simulate.programmes import (
    build_panel,
    gene_shares,
    neighbour_matrix,
    plant_programmes,
)

PROGRAMMES = {f"P{p}": [f"G{p}_{g}" for g in range(10)] for p in range(6)}


def settings(**changes) -> SimulateConfig:
    return SimulateConfig(n_programmes=6, n_genes=200, n_housekeeping=40, **changes)


def rng(index: int = 0) -> np.random.Generator:
    return random_stream(3, "test", index)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scattered_domains_keep_their_sizes_and_lose_their_places(share):
    lattice = draw_lattice(rng(), 400)
    domains = draw_domains(rng(1), lattice)
    moved = scatter(rng(2), domains, share)
    for name in ("coarse", "fine"):
        one, other = getattr(domains, name), getattr(moved, name)
        assert sorted(one) == sorted(other)
    assert np.array_equal(moved.fine // 2, moved.coarse)
    assert np.mean(domains.fine != moved.fine) <= share
    near = neighbour_matrix(lattice).tocoo()

    def alike(labels: np.ndarray) -> float:
        return float(np.mean(labels[near.row] == labels[near.col]))

    chance = sum(np.mean(domains.coarse == k) ** 2 for k in range(5))
    expected = (1 - share) ** 2 * alike(domains.coarse) + (1 - (1 - share) ** 2) * chance
    assert alike(moved.coarse) == pytest.approx(expected, abs=0.05)
    if share == 0:
        assert np.array_equal(domains.fine, moved.fine)


@pytest.mark.parametrize(("overlap", "n_shared"), [(0.0, 0), (0.25, 2), (0.5, 5), (0.9, 9)])
def test_a_programme_takes_genes_of_the_next_one(overlap, n_shared):
    plain = plant_programmes(PROGRAMMES, settings())
    shared = plant_programmes(PROGRAMMES, settings(overlap=overlap))
    assert shared.names == plain.names
    names = list(plain.names)
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        own = plain.genes[name]
        assert shared.genes[name][: len(own)] == own
        taken = shared.genes[name][len(own) :]
        assert len(taken) == n_shared
        assert set(taken) <= set(plain.genes[following])
    assert np.array_equal(shared.domain_effect, plain.domain_effect)


def test_a_shared_gene_follows_both_programmes():
    config = settings(overlap=0.5, dispersion=0.0)
    programmes = plant_programmes(PROGRAMMES, config)
    panel = build_panel(programmes, config)
    first, second = programmes.names[:2]
    gene = next(g for g in programmes.genes[first] if g in programmes.genes[second])
    alone = next(g for g in programmes.genes[second] if g not in programmes.genes[first])
    activity = np.zeros((2, 6))
    activity[1, 0] = 1.0  # only the first programme is active
    rise = {}
    for name in (gene, alone):
        column = list(panel.names).index(name)
        share = gene_shares(panel, activity, 0)[:, column]
        rise[name] = share[1] / share[0]
    assert rise[gene] > 1.1
    assert rise[alone] < 1.0  # its share falls because others rise


@pytest.mark.parametrize("change", [{"contiguity": 1.1}, {"overlap": -0.1}, {"overlap": 1.0}])
def test_knobs_out_of_range_are_refused(change):
    with pytest.raises(DataError, match=r"outside 0 to"):
        SimulateConfig(**change)
