"""A toy cohort with a planted factor shared by image and counts, and one where nothing is shared.

Three patients, four slides, 120 spots, 60 genes. Latent factors are smooth over the tissue; the
model ``hibio`` sees them with noise on both sides, the raw features are a noisy mixture of them.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial import cKDTree

from eval.folds.baselines import baselines, random_sets
from eval.folds.fold import Fold, Representation, SlideData
from pathways import PathwayDatabase, fit_anchors
from pathways.files import GeneSet
from preprocessing.coexpression import fit_gene_factors
from preprocessing.tfidf import TfidfReweighter
from tests.eval.image_cohort import cohort  # noqa: F401 - a fixture

N_SPOTS, N_GENES, N_FACTORS, SET_SIZE = 120, 60, 4, 8
PATIENT = {"a1": "A", "a2": "A", "b1": "B", "c1": "C", "c2": "C"}
TRAIN, TEST = ("a1", "a2", "b1"), ("c1", "c2")
GENES = np.array([f"GENE{i}" for i in range(N_GENES)])


def gene_sets() -> PathwayDatabase:
    """One set a factor, of the genes that it drives, and one of genes that nothing drives."""
    names = [f"SET{j}" for j in range(N_FACTORS + 1)]
    sets = [
        GeneSet(name, "", tuple(GENES[j * SET_SIZE : (j + 1) * SET_SIZE]))
        for j, name in enumerate(names)
    ]
    return PathwayDatabase.from_sets(sets, "toy")


def make_counts(slide_id: str, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Counts (S, G), latent factors (S, 4) and positions (S, 2) of one slide."""
    rng = np.random.default_rng([seed, *slide_id.encode()])
    side = np.stack(np.meshgrid(np.arange(12), np.arange(10)), axis=-1).reshape(-1, 2)
    xy_um = 100.0 * side + rng.uniform(-5, 5, size=side.shape)
    near = cKDTree(xy_um).query(xy_um, 7)[1]
    latent = rng.standard_normal((N_SPOTS, N_FACTORS))
    for _ in range(2):
        latent = latent[near].mean(axis=1)
    latent = (latent - latent.mean(axis=0)) / latent.std(axis=0)
    loading = np.zeros((N_FACTORS, N_GENES))
    for factor in range(N_FACTORS):
        loading[factor, factor * SET_SIZE : (factor + 1) * SET_SIZE] = 0.8
    depth = rng.lognormal(0.0, 0.2, size=(N_SPOTS, 1))
    level = np.random.default_rng(7).uniform(0.5, 2.0, size=N_GENES)
    counts = rng.poisson(depth * np.exp(level + latent @ loading))
    return sparse.csr_matrix(counts.astype(np.int32)), latent, xy_um


def make_slide(slide_id: str, counts: sparse.csr_matrix, tfidf, latent, xy_um) -> SlideData:
    """Slide with a domain label cut from the first factor, and planted activities."""
    domain = np.array(["left", "middle", "right"])[
        np.digitize(latent[:, 0], np.quantile(latent[:, 0], [1 / 3, 2 / 3]))
    ]
    domain = domain.astype(object)
    domain[:3] = "undetermined"
    table = {"domain": domain}
    table |= {f"activity:SET{j}": latent[:, j] for j in range(N_FACTORS)}
    near = cKDTree(xy_um).query(xy_um, 7)[1][:, 1:]
    return SlideData(
        slide_id, PATIENT[slide_id], counts, tfidf, xy_um, near, pd.DataFrame(table), True
    )


def make_fold(seed: int = 0, shared: bool = True, changed: str = "") -> Fold:
    """The toy fold.

    Args:
        seed: of all random numbers.
        shared: False: image embeddings, labels and activities have nothing to do with the counts.
        changed: a slide whose counts are drawn again (to see what they can influence).
    """
    made = {name: make_counts(name, seed + 100 * (name == changed)) for name in (*TRAIN, *TEST)}
    weights = TfidfReweighter().fit([made[name][0] for name in TRAIN])
    tfidf = {name: weights.transform(made[name][0]) for name in made}
    factors = fit_gene_factors(lambda: iter([tfidf[n] for n in TRAIN]), N_GENES, 8)
    hidden = {name: make_counts(name, seed if shared else seed + 1000)[1] for name in made}
    slides = {
        name: make_slide(name, made[name][0], tfidf[name], hidden[name], made[name][2])
        for name in made
    }
    if not shared:
        slides = {name: _shuffled(slide, seed) for name, slide in slides.items()}
        rng = np.random.default_rng(seed + 5)
        hidden = {name: rng.standard_normal((N_SPOTS, N_FACTORS)) for name in made}
    train, test = tuple(slides[n] for n in TRAIN), tuple(slides[n] for n in TEST)
    anchors = fit_anchors(gene_sets(), list(GENES), weights.idf, (tfidf[n] for n in TRAIN))
    features = _features(hidden, seed)
    known = {n: make_counts(n, seed)[1] for n in made} if not shared else hidden
    models = (_model(hidden, known, seed), *baselines(train, test, factors, features))
    random = random_sets(gene_sets(), list(GENES), weights.idf, train, seed)
    return Fold("toy", seed, GENES, train, test, models, anchors, random, factors)


def _model(hidden: dict, known: dict, seed: int) -> Representation:
    """The checkpoint: latent factors turned into 8 dimensions, with noise on either side."""
    rng = np.random.default_rng(seed + 1)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0][:N_FACTORS]
    image = {n: z @ turn + 0.1 * rng.standard_normal((N_SPOTS, 8)) for n, z in hidden.items()}
    omics = {n: z @ turn + 0.1 * rng.standard_normal((N_SPOTS, 8)) for n, z in known.items()}
    anchor = np.vstack([turn, np.zeros((1, 8))])
    return Representation("hibio", image, omics, ("planted",), anchor=anchor)


def _features(hidden: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 2)
    mix = np.random.default_rng(4).standard_normal((N_FACTORS, 12))
    return {
        name: 5.0 + z @ mix + 1.5 * rng.standard_normal((N_SPOTS, 12)) for name, z in hidden.items()
    }


def _shuffled(slide: SlideData, seed: int) -> SlideData:
    order = np.random.default_rng(seed + 9).permutation(slide.n_spots)
    return replace(slide, labels=slide.labels.iloc[order].reset_index(drop=True))


@pytest.fixture(scope="session")
def toy_fold() -> Fold:
    """Image and counts share four planted factors."""
    return make_fold()


@pytest.fixture(scope="session")
def null_fold() -> Fold:
    """Image, labels and activities are independent of the counts."""
    return make_fold(shared=False)


def tfidf_by(weights: TfidfReweighter):
    """How `hide` weighs the counts that are left."""
    return lambda counts, xy_um: {"tfidf": weights.transform(counts)}
