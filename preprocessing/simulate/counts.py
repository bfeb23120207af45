"""Counts of a simulated cohort: the gene panel, patient effects, depth, bleed, overdispersion.

Legend: G genes, P programmes, S spots.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.simulate.config import SimulateConfig, random_stream
from preprocessing.simulate.layout import Lattice
from preprocessing.simulate.programmes import Programmes

_HOUSEKEEPING_LEVEL = 3.0
_FILLER_LEVEL = 0.06
_LEVEL_SPREAD = 0.6
_HOUSEKEEPING_DISPERSION = 0.1
_NEIGHBOURS = ((0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Panel:
    """The genes measured in a cohort and their average levels.

    Attributes:
        names: (G,) symbols: programme genes, then HKG1.. (housekeeping), then BG1.. (fillers).
        ids: (G,) ENSGSIM identifiers.
        kinds: (G,) "programme", "housekeeping" or "filler".
        base: (G,) average share of the counts, sums to 1.
        effect: (P, G) log fold change per unit of activity, 0 outside the programme.
        patient: (patients, G) log shift of each gene in each patient.
        dispersion: (G,) negative binomial dispersion; a tenth for housekeeping genes.
    """

    names: NDArray[np.str_]
    ids: NDArray[np.str_]
    kinds: NDArray[np.str_]
    base: NDArray[np.float64]
    effect: NDArray[np.float64]
    patient: NDArray[np.float64]
    dispersion: NDArray[np.float64]


def build_panel(programmes: Programmes, config: SimulateConfig) -> Panel:
    """The panel of a cohort: housekeeping genes high and even, fillers low, the rest programmes.

    Housekeeping genes are called HKG, not HK: HK1, HK2 and HK3 are the human hexokinases. A made-up
    symbol that a programme uses is skipped.
    """
    rng = random_stream(config.seed, "panel")
    planted = list(dict.fromkeys(gene for genes in programmes.genes.values() for gene in genes))
    n_filler = config.n_genes - len(planted) - config.n_housekeeping
    blocks = {
        "programme": planted,
        "housekeeping": _made_up("HKG", config.n_housekeeping, set(planted)),
        "filler": _made_up("BG", n_filler, set(planted)),
    }
    names = np.array([gene for block in blocks.values() for gene in block])
    kinds = np.array([kind for kind, block in blocks.items() for _ in block])
    place = {gene: g for g, gene in enumerate(planted)}
    effect = np.zeros((len(programmes.genes), len(names)))
    for p, genes in enumerate(programmes.genes.values()):
        fold = config.effect * rng.uniform(0.6, 1.4, len(genes))
        effect[p, [place[gene] for gene in genes]] = fold
    return Panel(
        names=names,
        ids=np.array([f"ENSGSIM{g + 1:08d}" for g in range(len(names))]),
        kinds=kinds,
        base=_base_shares(rng, kinds),
        effect=effect,
        dispersion=config.dispersion
        * np.where(kinds == "housekeeping", _HOUSEKEEPING_DISPERSION, 1.0),
        patient=config.patient_effect * rng.standard_normal((config.n_patients, len(names))),
    )


def _base_shares(rng: np.random.Generator, kinds: NDArray[np.str_]) -> NDArray[np.float64]:
    """(G,) average share of each gene: housekeeping high and even, fillers low, sums to 1."""
    even = kinds == "housekeeping"
    weight = np.select([even, kinds == "filler"], [_HOUSEKEEPING_LEVEL, _FILLER_LEVEL], 1.0)
    share = weight * np.exp(rng.normal(0.0, np.where(even, 0.05, _LEVEL_SPREAD)))
    base: NDArray[np.float64] = share / share.sum()
    return base


def _made_up(prefix: str, n: int, taken: set[str]) -> list[str]:
    fresh = (name for i in count(1) if (name := f"{prefix}{i}") not in taken)
    return list(islice(fresh, n))


def gene_shares(panel: Panel, activity: NDArray[np.float64], patient: int) -> NDArray[np.float64]:
    """(S, G) expected share of each gene in each spot's own transcripts; rows sum to 1.

    A gene of n programmes takes the sum of their effects over the root of n, so that shared genes
    do not swamp a spot.
    """
    effect = panel.effect / np.sqrt(np.maximum(1, (panel.effect > 0).sum(axis=0)))
    log_fold = activity @ effect - 0.5 * (effect**2).sum(axis=0)
    rate = panel.base * np.exp(panel.patient[patient] + log_fold)
    shares: NDArray[np.float64] = rate / rate.sum(axis=1, keepdims=True)
    return shares


def neighbour_matrix(lattice: Lattice) -> sparse.csr_matrix:
    """(S, S) 0/1 adjacency of the spots in tissue on the hex lattice (up to six neighbours)."""
    row, column = lattice.array_row[lattice.in_tissue], lattice.array_col[lattice.in_tissue]
    width = int(column.max()) + 5
    key = (row + 1) * width + column + 2
    order = np.argsort(key)
    sources, targets = [], []
    for d_row, d_column in _NEIGHBOURS:
        wanted = key + d_row * width + d_column
        found = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
        hit = key[order][found] == wanted
        sources.append(np.flatnonzero(hit))
        targets.append(order[found[hit]])
    at = (np.concatenate(sources), np.concatenate(targets))
    return sparse.csr_matrix((np.ones(len(at[0])), at), shape=(len(key), len(key)))


def draw_counts(
    rng: np.random.Generator,
    expected: NDArray[np.float64],
    dispersion: NDArray[np.float64],
    leak: sparse.csr_matrix,
) -> sparse.csr_matrix:
    """Negative binomial counts with bleed: gamma expression, leak to the neighbours, then Poisson.

    Without a leak, variance = mean + dispersion * mean^2 exactly.

    Args:
        rng: Random generator.
        expected: (S, G) expected counts before the leak.
        dispersion: (G,) dispersion of each gene, 0 for Poisson.
        leak: (S, S) share of the expression of spot j (column) that is read at spot i (row).
    """
    expression = expected.copy()
    noisy = dispersion > 0
    shape = 1.0 / dispersion[noisy]
    expression[:, noisy] *= rng.standard_gamma(shape, (len(expected), len(shape))) / shape
    return sparse.csr_matrix(rng.poisson(leak @ expression).astype(np.int32))


def leak_matrix(lattice: Lattice, bleed: float) -> sparse.csr_matrix:
    """(S, S) share of every spot's expression read at every other; off the tissue it is lost."""
    stays = sparse.eye_array(int(lattice.in_tissue.sum()), format="csr") * (1 - bleed)
    return sparse.csr_matrix(stays + neighbour_matrix(lattice) * (bleed / len(_NEIGHBOURS)))


def draw_depth(
    rng: np.random.Generator, n_spots: int, shift: float, config: SimulateConfig
) -> NDArray[np.float64]:
    """(S,) expected counts: median depth times the slide's exp(shift) and log-normal spot noise."""
    depth: NDArray[np.float64] = config.depth * np.exp(
        shift + config.depth_sd * rng.standard_normal(n_spots)
    )
    return depth
