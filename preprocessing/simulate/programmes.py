"""What is planted in a simulated cohort, and the counts that follow.

Planted are programmes, where each is active and how it looks, and the niche behind the outcome:
compact tissue, clusters 200-400 um wide, in which two programmes are raised together that no domain
raises together. It takes the share ``outcome_effect`` of the tissue of patients with outcome 1, and
a quarter of that of the others, with a log-normal difference between patients. The counts have a
gene panel, patient effects, depth, bleed and overdispersion.
Legend: S spots, G genes, P programmes, F fine domains, Q smooth fields, T texture parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from preprocessing.errors import DataError
from preprocessing.simulate.config import SimulateConfig, random_stream
from preprocessing.simulate.layout import (
    N_COARSE,
    N_FINE,
    Domains,
    Lattice,
    gaussian_field,
)

MIN_GENES = 5  # of a programme
VARIANCE = {"coarse": 0.5, "fine": 0.25, "field": 0.17, "noise": 0.08}
N_FIELDS = 3
_FIELD_UM = 220.0
_VISIBLE = 0.5  # correlation ceiling
RAISE = 2.5  # activity that the niche adds
_NICHE_OTHERS = 0.25  # share of the niche in patients with outcome 0, relative to outcome 1
_NICHE_SD = 0.3  # log sd of the share between patients
_NICHE_MOST = 0.5  # of a slide
_NICHE_UM = (200.0, 400.0)
_HOUSEKEEPING_LEVEL = 3.0
_HOUSEKEEPING_DISPERSION = 0.1
_NEIGHBOURS = ((0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1))
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Programmes:
    """Planted programmes and the rule that makes their activity from the domains.

    Attributes:
        genes: Panel genes of each programme, in planted order.
        left_out: Genes of each programme that did not fit on the panel.
        too_small: Programmes given with fewer than ``MIN_GENES`` genes, never planted.
        domain_effect: (F, P) activity that each fine domain adds (coarse and fine effect), mean
            over domains 0.
        loading: (Q, P) weights of the smooth fields.
    """

    genes: dict[str, tuple[str, ...]]
    left_out: dict[str, int]
    too_small: tuple[str, ...]
    domain_effect: Doubles
    loading: Doubles

    @property
    def names(self) -> tuple[str, ...]:
        """Programme names in planted order."""
        return tuple(self.genes)

    @property
    def covariance(self) -> Doubles:
        """(P, P) covariance of the activities when every fine domain has the same area."""
        domain = self.domain_effect.T @ self.domain_effect / N_FINE
        noise = VARIANCE["noise"] * np.eye(len(self.genes))
        total: Doubles = domain + self.loading.T @ self.loading + noise
        return total


def plant_programmes(programmes: Mapping[str, Sequence[str]], config: SimulateConfig) -> Programmes:
    """Draw programmes (gene symbols of each), put their genes on the panel, give each its places.

    Where all genes do not fit beside the housekeeping genes, the panel holds the first n genes of
    every programme, with the largest n that fits.

    Raises:
        DataError: Too few usable programmes, or a panel too small for them.
    """
    rng = random_stream(config.seed, "programmes")
    unique = {name: tuple(dict.fromkeys(genes)) for name, genes in programmes.items()}
    usable = [name for name, genes in unique.items() if len(genes) >= MIN_GENES]
    if len(usable) < config.n_programmes:
        raise DataError(
            f"cannot plant n_programmes={config.n_programmes}: of {len(unique)} programmes given "
            f"{len(usable)} have at least {MIN_GENES} genes; lower n_programmes or give more"
        )
    picked = np.sort(rng.choice(len(usable), config.n_programmes, replace=False))
    chosen = {usable[i]: unique[usable[i]] for i in picked}
    room = config.n_genes - config.n_housekeeping
    keep = _genes_per_programme(chosen, room)
    panel = {gene for genes in chosen.values() for gene in genes[:keep]}
    planted = {name: tuple(g for g in genes if g in panel) for name, genes in chosen.items()}
    left_out = {name: len(chosen[name]) - len(genes) for name, genes in planted.items()}
    return Programmes(
        genes=_overlapping(planted, config),
        left_out=left_out,
        too_small=tuple(sorted(set(unique) - set(usable))),
        domain_effect=_domain_effect(rng, len(chosen)),
        loading=_field_loading(rng, len(chosen)),
    )


def _overlapping(
    planted: Mapping[str, tuple[str, ...]], config: SimulateConfig
) -> dict[str, tuple[str, ...]]:
    """Every programme with some genes of the next one behind its own (``config.overlap``)."""
    rng = random_stream(config.seed, "overlap")
    names = list(planted)
    shared = {}
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        own, next_ones = planted[name], planted[following]
        wanted = min(round(config.overlap * len(own)), len(next_ones))
        taken = [next_ones[i] for i in np.sort(rng.permutation(len(next_ones))[:wanted])]
        shared[name] = tuple(dict.fromkeys([*own, *taken]))
    return shared


def _genes_per_programme(chosen: Mapping[str, tuple[str, ...]], room: int) -> int:
    """The largest n such that the first n genes of every programme fit in ``room`` panel places."""
    first_use: dict[str, int] = {}
    for genes in chosen.values():
        for position, gene in enumerate(genes):
            first_use[gene] = min(position, first_use.get(gene, position))
    positions = np.sort(np.fromiter(first_use.values(), dtype=np.int64))
    longest = max(map(len, chosen.values()))
    keep = int(positions[room]) if len(positions) > room else longest
    if keep < MIN_GENES:
        needed = int(np.searchsorted(positions, MIN_GENES))
        raise DataError(
            f"the panel has room for {room} programme genes, but {len(chosen)} programmes with "
            f"{MIN_GENES} genes each need {needed}; raise n_genes or lower n_programmes"
        )
    return keep


def _domain_effect(rng: np.random.Generator, n: int) -> Doubles:
    """(F, P) activity of each fine domain.

    Every programme is raised in a home coarse domain, often in a second one, and in one half of
    some coarse domains, always of its home, more than in the other half. The homes go round, so
    that every domain raises several programmes.
    """
    home = rng.permutation(np.arange(n) % N_COARSE)
    coarse = np.zeros((N_COARSE, n))
    second = (home + rng.integers(1, N_COARSE, n)) % N_COARSE
    coarse[second, np.arange(n)] = rng.choice([0.0, 0.7], n, p=[0.5, 0.5])
    coarse[home, np.arange(n)] = 1.0
    half = rng.choice([-1.0, 0.0, 1.0], (N_COARSE, n), p=[0.2, 0.6, 0.2])
    for domain in range(N_COARSE):
        at_home = np.flatnonzero(home == domain)
        half[domain, at_home] = np.where(np.arange(len(at_home)) % 2, 1.0, -1.0)
    coarse_f = np.repeat(coarse - coarse.mean(axis=0), 2, axis=0)
    fine_f = np.repeat(half, 2, axis=0) * np.tile([1.0, -1.0], N_COARSE)[:, None]
    effect: Doubles = math.sqrt(VARIANCE["coarse"]) * coarse_f / coarse_f.std(axis=0)
    effect += math.sqrt(VARIANCE["fine"]) * fine_f / fine_f.std(axis=0)
    return effect


def _field_loading(rng: np.random.Generator, n: int) -> Doubles:
    loading = rng.standard_normal((N_FIELDS, n))
    scaled: Doubles = loading / np.linalg.norm(loading, axis=0)
    return scaled * math.sqrt(VARIANCE["field"])


def draw_activity(
    rng: np.random.Generator, programmes: Programmes, lattice: Lattice, domains: Domains
) -> Doubles:
    """(S, P) log-activity: domain effects + smooth fields + spot noise, variance about 1."""
    at = lattice.spot_cells
    shape = lattice.inside_um.shape
    latent = np.stack([gaussian_field(rng, shape, _FIELD_UM)[at] for _ in range(N_FIELDS)], axis=1)
    noise = rng.standard_normal((len(domains.fine), len(programmes.genes)))
    activity: Doubles = programmes.domain_effect[domains.fine]
    return activity + latent @ programmes.loading + math.sqrt(VARIANCE["noise"]) * noise


def texture_map(rng: np.random.Generator, programmes: Programmes, n_textures: int) -> Doubles:
    """(P, T) linear map from activities to texture parameters, one for the whole cohort.

    The leading principal axes of the activities, half whitened (so that weak axes can be seen
    too), under a random rotation; every parameter has variance 1.
    """
    covariance = programmes.covariance
    value, axis = np.linalg.eigh(covariance)
    n_axes = min(n_textures, len(value))
    leading = axis[:, ::-1][:, :n_axes] * value[::-1][:n_axes] ** -0.25
    rotation, _ = np.linalg.qr(rng.standard_normal((n_textures, n_textures)))
    mixed = leading @ rotation[:n_axes]
    scaled: Doubles = mixed / np.sqrt(np.einsum("pt,pq,qt->t", mixed, covariance, mixed))
    return scaled


def visibility(programmes: Programmes, mapping: Doubles, signal: float) -> dict[str, float]:
    """Highest correlation a linear read-out of the texture can reach, per programme (0 to 1)."""
    covariance = programmes.covariance
    cross = covariance @ mapping
    explained = (cross @ np.linalg.pinv(mapping.T @ cross) * cross).sum(axis=1)
    ceiling = np.sqrt(signal * explained / np.diag(covariance))
    return {name: round(float(r), 4) for name, r in zip(programmes.names, ceiling, strict=True)}


def visible_programmes(ceiling: Mapping[str, float]) -> list[str]:
    """Names of the programmes that the image shows: correlation ceiling of at least 0.5."""
    return [name for name, r in ceiling.items() if r >= _VISIBLE]


@dataclass(frozen=True)
class Outcomes:
    """Outcome and niche of every patient.

    Attributes:
        outcome: (patients,) 0 or 1, half and half (one more 0 where the number is odd).
        share: (patients,) share of the spots that the niche takes.
        pair: The two programmes that the niche raises by `RAISE`, by position.
    """

    outcome: NDArray[np.int64]
    share: Doubles
    pair: tuple[int, int]

    def niche(self, rng: np.random.Generator, lattice: Lattice, patient: int) -> NDArray[np.bool_]:
        """(S,) which spots of a slide are in the niche: the given share, in whole clusters.

        Clusters are added at random places until the share is reached; the last is cut to fit.
        """
        xy = lattice.spots_um
        inside = np.zeros(len(xy), dtype=bool)
        missing = round(self.share[patient] * len(xy))
        while missing > 0:
            centre = xy[rng.choice(np.flatnonzero(~inside))]
            reach = rng.uniform(*_NICHE_UM) / 2
            apart = np.hypot(*(xy - centre).T)
            free = np.flatnonzero(~inside & (apart <= max(reach, lattice.pitch_um)))
            chosen = free[np.argsort(apart[free], kind="stable")][:missing]
            inside[chosen] = True
            missing -= len(chosen)
        return inside

    def raised(self, activity: Doubles, niche: NDArray[np.bool_]) -> Doubles:
        """Activity (S, P) with the pair raised in the niche."""
        changed = activity.copy()
        for programme in self.pair:
            changed[niche, programme] += RAISE
        return changed


def draw_outcomes(programmes: Programmes, config: SimulateConfig) -> Outcomes:
    """The outcome of each patient, drawn whatever the effect, and the niche share that follows.

    The pair are the two programmes whose domain effects are the most opposed.
    """
    rng = random_stream(config.seed, "outcome")
    outcome = rng.permutation(np.arange(config.n_patients) % 2)
    between = np.exp(_NICHE_SD * rng.standard_normal(config.n_patients))
    share = config.outcome_effect * np.where(outcome == 1, 1.0, _NICHE_OTHERS) * between
    together = np.corrcoef(programmes.domain_effect.T)
    first, second = np.unravel_index(np.argmin(together), together.shape)
    pair = (int(first), int(second))
    return Outcomes(outcome.astype(np.int64), np.minimum(share, _NICHE_MOST), pair)


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
    base: Doubles
    effect: Doubles
    patient: Doubles
    dispersion: Doubles


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
        base=_base_shares(rng, kinds, config),
        effect=effect,
        dispersion=config.dispersion
        * np.where(kinds == "housekeeping", _HOUSEKEEPING_DISPERSION, 1.0),
        patient=config.patient_effect * rng.standard_normal((config.n_patients, len(names))),
    )


def _base_shares(
    rng: np.random.Generator, kinds: NDArray[np.str_], config: SimulateConfig
) -> Doubles:
    """(G,) average share of each gene: housekeeping high and even, fillers lower, sums to 1."""
    even = kinds == "housekeeping"
    weight = np.select([even, kinds == "filler"], [_HOUSEKEEPING_LEVEL, config.filler_level], 1.0)
    share = weight * np.exp(rng.normal(0.0, np.where(even, 0.05, config.level_spread)))
    base: Doubles = share / share.sum()
    return base


def _made_up(prefix: str, n: int, taken: set[str]) -> list[str]:
    fresh = (name for i in count(1) if (name := f"{prefix}{i}") not in taken)
    return list(islice(fresh, n))


def gene_shares(panel: Panel, activity: Doubles, patient: int) -> Doubles:
    """(S, G) expected share of each gene in each spot's own transcripts; rows sum to 1.

    A gene of n programmes takes the sum of their effects over the root of n, so that shared genes
    do not swamp a spot.
    """
    effect = panel.effect / np.sqrt(np.maximum(1, (panel.effect > 0).sum(axis=0)))
    log_fold = activity @ effect - 0.5 * (effect**2).sum(axis=0)
    rate = panel.base * np.exp(panel.patient[patient] + log_fold)
    shares: Doubles = rate / rate.sum(axis=1, keepdims=True)
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
    expected: Doubles,
    dispersion: Doubles,
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
) -> Doubles:
    """(S,) expected counts: median depth times the slide's exp(shift) and log-normal spot noise."""
    depth: Doubles = config.depth * np.exp(shift + config.depth_sd * rng.standard_normal(n_spots))
    return depth
