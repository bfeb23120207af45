"""What every report must show beside the model, built from data alone (docs/method.md 6).

Each baseline is a `Representation`, so that tasks treat it as they treat the model. Whatever is
fitted sees training slides only; standardising per slide uses no labels.

Shapes: S spots, G genes, F features, r factors.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from eval.errors import FoldError
from eval.folds.fold import Representation, SlideData
from eval.folds.variable_genes import dense_expression, expression, variable_genes
from eval.measures.ridge import zscore
from eval.results import RAW
from pathways import PathwayAnchors, PathwayDatabase, fit_anchors, matched_random
from preprocessing.coexpression import GeneFactors, spot_vectors, standardise
from preprocessing.graphs import neighbour_mean

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
        ``coordinates``, ``log_depth``, ``pca_expression`` and ``pca_expression_neighbours``; with
        factors ``lsa`` and ``lsa_neighbours``; with features ``raw_features``.
    """
    slides = (*train, *test)
    rows = [coordinates(slides), log_depth(slides)]
    rows += pca_expression(train, test)
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


def lsa(slides: Sequence[SlideData], factors: GeneFactors) -> list[Representation]:
    """The spot vector (docs/method.md 3) alone, and with the mean of its neighbours beside it.

    Args:
        slides: all slides of the fold.
        factors: fitted on the training slides.

    Returns:
        ``lsa`` (S, r) and ``lsa_neighbours`` (S, 2 r).
    """
    own, beside = {}, {}
    for slide in slides:
        rows = standardise(spot_vectors(slide.tfidf, factors), factors)[0].astype(np.float64)
        own[slide.slide_id] = rows
        beside[slide.slide_id] = _with_neighbours(rows, slide)
    note = ("TF-IDF through the training SVD, standardised per slide: the bar for the encoder",)
    return [
        Representation("lsa", omics=own, notes=note, aligned=False),
        Representation("lsa_neighbours", omics=beside, notes=note, aligned=False),
    ]


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


def _with_neighbours(rows: np.ndarray, slide: SlideData) -> np.ndarray:
    """Own values and the mean of the neighbours, side by side."""
    return np.hstack([rows, neighbour_mean(rows, slide.neighbours)])
