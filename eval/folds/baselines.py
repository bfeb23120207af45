"""What every report must show beside the model, built from data alone (docs/method.md 6).

Each baseline is a `Representation`, so that tasks treat it as they treat the model. Whatever is
fitted sees training slides only; standardising per slide uses no labels. For imputation genes are
hidden, and model and baselines computed again without them.
Shapes: S spots, G genes, H hidden genes, F features, r factors, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from eval.embed import Checkpoint
from eval.errors import FoldError
from eval.folds.fold import (
    HiddenGenes,
    Representation,
    SlideData,
    dense_expression,
    expression,
    variable_genes,
)
from eval.measures.ridge import zscore
from eval.results import DECODER_SUFFIX, RAW, TOWER_SUFFIX
from hibio.artifacts import Artifacts
from hibio.data.slide import prepare_slide
from hibio.data.splits import SlideEntry
from hibio.keys import MAIN
from pathways import PathwayAnchors, PathwayDatabase, fit_anchors, matched_random
from preprocessing.coexpression import GeneFactors, spot_vectors, standardise
from preprocessing.graphs import neighbour_mean, smooth

Transform = Callable[[sparse.csr_matrix, np.ndarray], dict[str, sparse.csr_matrix]]
Decoded = dict[str, dict[str, np.ndarray]]

PCA_GENES = 2000  # variable genes that the PCA of expression sees
PCA_COMPONENTS = 30
SEED = 0  # of the randomised PCA


def baselines(
    train: Sequence[SlideData],
    test: Sequence[SlideData],
    factors: GeneFactors | None = None,
    features: Mapping[str, np.ndarray] | None = None,
) -> tuple[Representation, ...]:
    """All baselines that the given parts allow, in the order of the report.

    Args:
        train: training slides.
        test: test slides.
        factors: of the training slides, for the spot-vector rows.
        features: slide_id -> (S, F) stored image features, for the raw-feature row.

    Returns:
        ``coordinates``, ``log_depth``, ``pca_expression``, ``pca_expression_neighbours`` and
        ``niche_pca``; with factors ``lsa`` and ``lsa_neighbours``; with features ``raw_features``.
    """
    slides = (*train, *test)
    rows = [coordinates(slides), log_depth(slides), *pca_expression(train, test)]
    rows.append(niche_pca(train, test))
    if factors is not None:
        rows += lsa(slides, factors)
    if features is not None:
        rows.append(raw_features(slides, features, factors))
    return tuple(rows)


def coordinates(slides: Sequence[SlideData]) -> Representation:
    """Spot positions, standardised per slide, as image and as omics embedding."""
    xy = {slide.slide_id: zscore(slide.xy_um) for slide in slides}
    pictured = {slide.slide_id: xy[slide.slide_id] for slide in slides if slide.has_image}
    return Representation(
        "coordinates",
        image=pictured or None,
        omics=xy,
        notes=("positions only, standardised per slide",),
        aligned=False,
    )


def raw_features(
    slides: Sequence[SlideData],
    features: Mapping[str, np.ndarray],
    factors: GeneFactors | None = None,
) -> Representation:
    """Stored image features, z-scored per slide; its omics side is the spot vector.

    Args:
        slides: all slides of the fold.
        features: slide_id -> (S, F) for every slide with an image.
        factors: None leaves the omics side out (and with it ridge retrieval).

    Raises:
        FoldError: a slide with an image has no features.
    """
    pictured = [slide for slide in slides if slide.has_image]
    missing = [slide.slide_id for slide in pictured if slide.slide_id not in features]
    if missing:
        raise FoldError(
            f"raw_features: {len(missing)} slides with an image have no stored features: "
            f"{missing[:5]}; write them with `hibio prepare`"
        )
    return Representation(
        RAW,
        image={s.slide_id: zscore(features[s.slide_id]) for s in pictured},
        omics=None if factors is None else lsa(slides, factors)[1].omics,
        notes=("stored image features, z-scored per slide; no training",),
        aligned=False,
    )


def log_depth(slides: Sequence[SlideData]) -> Representation:
    """ln(1 + sum of a spot) and its neighbours' mean, z-scored per slide."""
    rows = {}
    for slide in slides:
        depth = np.log1p(np.asarray(slide.counts.sum(axis=1), dtype=np.float64).reshape(-1, 1))
        rows[slide.slide_id] = zscore(_with_neighbours(depth, slide))
    note = "the sum of a spot only: sequencing depth, or total intensity of proteins"
    return Representation("log_depth", omics=rows, notes=(note,), aligned=False)


def pca_expression(train: Sequence[SlideData], test: Sequence[SlideData]) -> list[Representation]:
    """PCA of expression on variable genes, fitted on training slides, z-scored per slide.

    Returns:
        ``pca_expression`` (S, components), and ``pca_expression_neighbours`` with the mean of the
        neighbours beside it.
    """
    genes = variable_genes(train, PCA_GENES)
    fitted_on = np.concatenate([dense_expression(slide, genes) for slide in train])
    size = min(PCA_COMPONENTS, *fitted_on.shape)
    pca = PCA(size, svd_solver="randomized", random_state=SEED).fit(fitted_on)
    own, beside = {}, {}
    for slide in (*train, *test):
        rows = zscore(pca.transform(dense_expression(slide, genes)))
        own[slide.slide_id] = rows
        beside[slide.slide_id] = _with_neighbours(rows, slide)
    name = "log1p CP10k" if train[0].modality == "rna" else "arcsinh intensities"
    note = (f"PCA {size} of {name} on {len(genes)} variable genes of the training slides",)
    return [
        Representation("pca_expression", omics=own, notes=note, aligned=False),
        Representation("pca_expression_neighbours", omics=beside, notes=note, aligned=False),
    ]


def niche_pca(train: Sequence[SlideData], test: Sequence[SlideData]) -> Representation:
    """PCA of what the neighbour term of the model asks for (docs/method.md 3.1), without training.

    Variable genes' shares of the counts (unit rows), z-scored per slide, are averaged over a spot
    and its neighbours; PCA is fitted on training slides.
    """
    genes = variable_genes(train, PCA_GENES)
    niche = {}
    for slide in (*train, *test):
        rna = slide.modality == "rna"
        rows = normalize(slide.counts, copy=True) if rna else expression(slide)
        niche[slide.slide_id] = smooth(zscore(rows[:, genes].toarray()), slide.neighbours, 1)
    fitted_on = np.concatenate([niche[slide.slide_id] for slide in train])
    size = min(PCA_COMPONENTS, *fitted_on.shape)
    pca = PCA(size, svd_solver="randomized", random_state=SEED).fit(fitted_on)
    return Representation(
        "niche_pca",
        omics={name: pca.transform(rows) for name, rows in niche.items()},
        notes=(f"PCA {size} of {len(genes)} genes' shares, mean of a spot and its neighbours",),
        aligned=False,
    )


def lsa(slides: Sequence[SlideData], factors: GeneFactors) -> list[Representation]:
    """The spot vector (docs/method.md 3) alone, and with the mean of its neighbours beside it.

    Returns:
        ``lsa`` (S, r) and ``lsa_neighbours`` (S, 2 r).
    """
    own, beside = {}, {}
    for slide in slides:
        rows = standardise(spot_vectors(slide.profiles, factors), factors)[0].astype(np.float64)
        own[slide.slide_id] = rows
        beside[slide.slide_id] = _with_neighbours(rows, slide)
    note = ("TF-IDF through the training SVD, standardised per slide: the bar for the encoder",)
    return [
        Representation("lsa", omics=own, notes=note, aligned=False),
        Representation("lsa_neighbours", omics=beside, notes=note, aligned=False),
    ]


def _with_neighbours(rows: np.ndarray, slide: SlideData) -> np.ndarray:
    """Own values and the mean of the neighbours, side by side."""
    return np.hstack([rows, neighbour_mean(rows, slide.neighbours)])


def random_sets(
    database: PathwayDatabase,
    genes: Sequence[str],
    idf: npt.ArrayLike,
    train: Sequence[SlideData],
    seed: int,
) -> PathwayAnchors:
    """Anchors of random sets matched in size and mean expression: the control of docs/method.md 2.

    Args:
        database: restricted to the genes.
        genes: (G,) vocabulary of the fold.
        idf: (G,) of the training spots.
        train: training slides, which give mean expression and the standardising.
        seed: of the draw.
    """
    total = np.sum([np.asarray(expression(s).sum(axis=0)).ravel() for s in train], axis=0)
    mean = total / sum(slide.n_spots for slide in train)
    drawn = matched_random(database, list(genes), mean, seed)
    return fit_anchors(drawn, list(genes), idf, (slide.tfidf for slide in train))


@dataclass(frozen=True)
class HiddenGenesConfig:
    """Which genes are hidden, and how much is computed without them.

    Args:
        fraction: share of the eligible genes that is hidden.
        max_genes: at most this many.
        min_detected: a gene is eligible when it is found in this share of the training spots.
        min_visible: genes that must stay visible.
        max_train_spots: whole training slides are taken, in random order, until they have this
            many spots.
        seed: of both draws; the same for every seed of the models.
    """

    fraction: float = 0.2
    max_genes: int = 100
    min_detected: float = 0.1
    min_visible: int = 20
    max_train_spots: int = 20_000
    seed: int = 0


def choose_genes(slides: Sequence[SlideData], config: HiddenGenesConfig) -> np.ndarray:
    """Columns (H,) of the hidden genes, ascending; a random draw among those detected."""
    n_spots = sum(slide.n_spots for slide in slides)
    detected = np.sum([np.asarray((s.counts > 0).sum(axis=0)).ravel() for s in slides], axis=0)
    eligible = np.flatnonzero(detected >= max(1.0, config.min_detected * n_spots))
    n_genes = slides[0].counts.shape[1]
    size = min(int(config.fraction * len(eligible)), config.max_genes, n_genes - config.min_visible)
    drawn = np.random.default_rng(config.seed).permutation(eligible)[: max(size, 0)]
    return np.sort(drawn)


def without_genes(slide: SlideData, columns: np.ndarray, transform: Transform) -> SlideData:
    """The slide as if the genes of these columns (H,) had not been measured."""
    visible = np.ones(slide.counts.shape[1], dtype=slide.counts.dtype)
    visible[columns] = 0
    counts = sparse.csr_matrix(slide.counts @ sparse.diags(visible, dtype=slide.counts.dtype))
    counts.eliminate_zeros()
    return replace(slide, counts=counts, **transform(counts, slide.xy_um))


def hide(
    train: Sequence[SlideData],
    test: Sequence[SlideData],
    genes: np.ndarray,
    transform: Transform,
    config: HiddenGenesConfig | None = None,
) -> HiddenGenes:
    """Draw genes and remove them from every slide; no representation is computed yet.

    Args:
        train: training slides; empty where nothing is held out.
        test: test slides.
        genes: (G,) vocabulary.
        transform: counts (S, G) and centres in micrometres to ``tfidf`` and ``profile`` of a slide.
        config: settings.

    Returns:
        The parts without ``models``; no names, and a note, where too few genes are eligible.
    """
    config = config or HiddenGenesConfig()
    fitted_on = _first_slides(train, config)
    columns = choose_genes(fitted_on or test, config)
    if not len(columns):
        text = (
            f"none of {len(genes)} genes can be hidden: a gene must be found in "
            f"{config.min_detected:.0%} of the spots and {config.min_visible} must stay visible"
        )
        return HiddenGenes((), (), (), {}, notes=(text,))
    names = tuple(str(name) for name in genes[columns])
    slides = (*fitted_on, *test)
    truth = {s.slide_id: dense_expression(s, columns).astype(np.float32) for s in slides}
    cut = {s.slide_id: without_genes(s, columns, transform) for s in slides}
    notes = [
        f"{len(names)} of {len(genes)} genes hidden, drawn at random (seed {config.seed}) among "
        f"those found in {config.min_detected:.0%} of the spots: {', '.join(names[:8])} ...; "
        "their counts are removed before depth, TF-IDF and everything after"
    ]
    if len(fitted_on) < len(train):
        notes.append(f"read-outs are fitted on {len(fitted_on)} of {len(train)} training slides")
    return HiddenGenes(
        names,
        tuple(cut[s.slide_id] for s in fitted_on),
        tuple(cut[s.slide_id] for s in test),
        truth,
        notes=tuple(notes),
    )


def _first_slides(train: Sequence[SlideData], config: HiddenGenesConfig) -> list[SlideData]:
    """Training slides in random order until there are enough spots."""
    chosen: list[SlideData] = []
    for index in np.random.default_rng(config.seed).permutation(len(train)):
        if sum(slide.n_spots for slide in chosen) >= config.max_train_spots:
            break
        chosen.append(train[index])
    return chosen


def with_representations(
    hidden: HiddenGenes,
    checkpoints: Sequence[Checkpoint],
    entries: Sequence[SlideEntry],
    artifacts: Artifacts,
    *,
    with_baselines: bool,
) -> HiddenGenes:
    """Embed the slides of `hide` without the genes by every checkpoint and, if asked, baseline."""
    if not hidden.names:
        return hidden
    slides = (*hidden.train, *hidden.test)
    wanted = {slide.slide_id for slide in slides}
    used = [entry for entry in entries if entry.slide_id in wanted]
    models: list[Representation] = []
    decoded: Decoded = {}
    for checkpoint in checkpoints:
        models += _embedded(checkpoint, used, hidden, decoded)
    if with_baselines:
        held_out = hidden.test if hidden.train else ()
        models += baselines(hidden.train or hidden.test, held_out, artifacts.factors)
        columns = np.flatnonzero(np.isin(artifacts.genes, hidden.names))
        decoded["lsa" + DECODER_SUFFIX] = {
            s.slide_id: factor_prediction(s.profiles, artifacts.factors, columns)
            for s in hidden.test
        }
    return replace(hidden, models=tuple(models), decoded=decoded)


def tower_row(tower: Mapping[str, np.ndarray]) -> Representation:
    """The row of the main model's omics tower, slide_id -> (S, D)."""
    note = "output of the omics tower, before the projection to the shared space"
    name = MAIN + TOWER_SUFFIX
    return Representation(name, None, tower, (note,), "variant", aligned=False)


def factor_prediction(
    tfidf: sparse.csr_matrix, factors: GeneFactors, columns: np.ndarray
) -> np.ndarray:
    """Hidden genes (S, H) of the linear-factor model: least squares on the visible genes (S, G)."""
    components = factors.components.astype(np.float64)
    visible = components.copy()
    visible[columns] = 0.0
    weights = np.asarray(tfidf @ visible) @ np.linalg.pinv(visible.T @ visible)
    return np.asarray(weights @ components[columns].T)


def _embedded(
    checkpoint: Checkpoint, entries: Sequence[SlideEntry], hidden: HiddenGenes, decoded: Decoded
) -> list[Representation]:
    """Omics embeddings of a checkpoint without the genes; its decoder's predictions as well."""
    model, variant, names = checkpoint.model, checkpoint.variant, hidden.names
    decodes = hasattr(model.omics, "encode") and {*names} <= {*model.artifacts.genes}
    tested = {slide.slide_id for slide in hidden.test}
    omics, tower, predicted = {}, {}, {}
    for entry in entries:
        slide = prepare_slide(entry.path, model.artifacts, None, hidden=names)
        embedding = model.encode_slide(slide)
        assert embedding.omics is not None
        assert embedding.tower is not None
        omics[entry.slide_id], tower[entry.slide_id] = embedding.omics, embedding.tower
        if decodes and entry.slide_id in tested:
            predicted[entry.slide_id] = model.impute(slide, names)
    if decodes:
        decoded[variant + DECODER_SUFFIX] = predicted
    rows = [Representation(variant, omics=omics, role=checkpoint.role)]
    return [*rows, tower_row(tower)] if variant == MAIN else rows
