"""Spatial domains, or niches of cells, by clustering frozen embeddings (docs/method.md 6.3 and 7).

Metrics ``omics_ari/kmeans``, ``omics_ari/gmm``, both also with ``_smooth`` (embeddings averaged
over neighbours before clustering), ``_label_smooth`` (cluster labels replaced by the majority of
the neighbours afterwards), ``_graph`` (axes of the embedding in order of spatial smoothness, see
`spatial_axes`) and ``_graph_smooth`` (those axes averaged over neighbours); the same with ``nmi``
and ``ami``, and with ``image_`` for the image embedding; one value per test slide and label column.
Shapes: S spots, D dimensions, R their rank, C components, k neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from eval.errors import FoldError
from eval.folds.fold import MODALITIES, Fold, SlideData
from eval.measures.metrics import WORDS, ami, ari, nmi
from eval.results import Measure, Question, ResultTable, TaskResult
from hibio.config.schema import Count, Rounds
from preprocessing.graphs import neighbour_weights, smooth

QUESTION = Question(
    "domains",
    "Clusters of the embedding compared with annotated tissue domains or cell niches; the number "
    "of clusters is the number of labels, and labels are used for scoring only.",
    (
        "omics_ari/kmeans",
        "omics_ari/gmm",
        "omics_ari/kmeans_smooth",
        "omics_ari/gmm_smooth",
        "omics_ari/kmeans_label_smooth",
        "omics_ari/kmeans_graph",
        "omics_ari/gmm_graph_smooth",
        "omics_nmi/gmm_smooth",
        "omics_ami/gmm_smooth",
        "image_ari/kmeans",
    ),
)
#: Part of a method's name -> what it does.
METHODS = {
    "_label_smooth": "label_smooth: cluster labels replaced by the majority among the neighbours "
    "afterwards",
    "_graph": "graph: axes of the embedding that vary most over the tissue beside what differs "
    "between neighbours (minimum noise fraction); fitted on the slide, without labels",
}
#: Directions of less variance than this share of the widest are rounding and are dropped.
RANK_TOLERANCE = 1e-10
#: Spots whose standard deviation is at most this share of the largest number are all the same.
ROUNDING = 1e-12
#: Smallest noise share: a direction without any noise counts as a signal-to-noise ratio of 1e6.
MIN_NOISE_SHARE = 1e-6
#: With fewer spots for each dimension white noise too has smooth axes, those of the graph itself.
SPOTS_PER_DIMENSION = 4
SCORES = {"ari": ari, "nmi": nmi, "ami": ami}
ADJUSTED = ("ari", "ami")  # random clusters score 0


def spatial_axes(rows: np.ndarray, neighbours: np.ndarray, n_components: int) -> np.ndarray:
    """Project on the axes u of largest w in `covariance @ u = w * noise_covariance @ u`.

    Switzer & Green (1984); Green et al. (1988), IEEE TGRS 26:65; close to MULTISPATI (Dray et al.
    2008). Noise of a spot is its embedding minus the mean of its spatial neighbours; the result is
    one linear map of each spot's own embedding, fitted on the slide itself without labels.
    Noise has unit variance on every axis, so what is smooth over the tissue has a large scale. The
    pair of covariances is diagonalised by whitening the embedding and then turning it by the
    eigenvectors of its noise: any well-conditioned linear map of the embedding gives the same axes.

    Args:
        rows: (S, D) embedding.
        neighbours: (S, k) spatial neighbours padded with -1. A spot without any counts in the
            covariance and is projected, but has no part in the noise.
        n_components: axes to keep, the one of largest signal-to-noise ratio first.

    Returns:
        (S, C), centred, in float64; C is the smaller of ``n_components`` and the rank R. Signs are
        arbitrary.

    Raises:
        FoldError: fewer than two spots, no component asked for, one embedding at all spots, or
            fewer than four spots with neighbours for each dimension.
    """
    if len(rows) < 2 or n_components < 1:
        raise FoldError(
            f"found {len(rows)} spots and {n_components} components asked for; spatial axes need "
            "two spots and one component: leave the slide out or ask for more components"
        )
    white = _whitened(rows)
    size = white.shape[1]
    present = (neighbours >= 0).any(axis=1)
    if present.sum() < SPOTS_PER_DIMENSION * size:
        raise FoldError(
            f"found {present.sum()} spots with spatial neighbours for {size} dimensions; expected "
            f"{SPOTS_PER_DIMENSION} a dimension: build the spatial graph or reduce the embedding "
            "first"
        )
    noise = (white - neighbour_weights(neighbours) @ white)[present]
    kept = [0, min(n_components, size) - 1]
    share, turn = eigh(noise.T @ noise / len(noise), subset_by_index=kept)
    return np.asarray(white @ (turn / np.sqrt(np.maximum(share, MIN_NOISE_SHARE))))


def _whitened(rows: np.ndarray) -> np.ndarray:
    """Centred rows (S, R) of identity covariance, without directions that do not vary."""
    centred = np.asarray(rows, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    variance, turn = eigh(centred.T @ centred / len(centred))
    kept = variance > RANK_TOLERANCE * variance[-1]
    if variance[-1] <= (ROUNDING * np.abs(rows).max()) ** 2:
        raise FoldError(
            f"found one embedding at all {len(rows)} spots; expected spots that differ: leave "
            "this embedding out"
        )
    return np.asarray(centred @ (turn[:, kept] / np.sqrt(variance[kept])))


@dataclass(frozen=True)
class DomainsConfig:
    """Settings of the domain task.

    Args:
        n_components: principal components that are clustered, when there are more dimensions.
        rounds: of smoothing: a spot becomes the mean of itself and its neighbours.
        label_rounds: of label smoothing: a spot takes the majority of itself and its neighbours.
        graph_components: spatial axes that are clustered in the ``_graph`` rows.
        n_neighbours: neighbours in a round, and of the spatial axes.
        n_seeds: cluster seeds whose scores are averaged.
        n_init: starts of one k-means.
        min_spots: a class with fewer labelled spots on the slide is left out.
    """

    n_components: Count = 30
    rounds: Rounds = 4
    label_rounds: Rounds = 1
    graph_components: Count = 15
    n_neighbours: Count = 6
    n_seeds: Count = 3
    n_init: Count = 5
    min_spots: Count = 10


def run(fold: Fold, config: DomainsConfig) -> TaskResult:
    """Cluster every test slide with K = its number of labels and compare with the labels."""
    table = ResultTable(QUESTION)
    cases = [case for slide in fold.test for case in _labelled(slide, config, table)]
    if not cases:
        table.note(f"fold {fold.name}: no test slide has a column with two classes; not run")
    models = (*fold.models, *fold.per_slide)
    for model in models:
        for modality in MODALITIES:
            for slide, column, truth in cases:
                if model.covers(modality, slide):
                    rows = model.rows(modality, [slide])[0]
                    where = (model.name, modality, fold.key(f"{slide.slide_id}:{column}"))
                    _add(table, where, (slide, truth, rows), config)
    return table.result(models)


def smooth_labels(labels: np.ndarray, neighbours: np.ndarray, rounds: int) -> np.ndarray:
    """Repeated majority vote of each spot and its neighbours; a tie keeps the spot's own label.

    The spatial post-processing of clustering papers (GraphST and STAGATE call it refinement).

    Args:
        labels: (S,) cluster numbers from 0.
        neighbours: (S, k) padded with -1.
        rounds: repetitions; all spots change at once.

    Returns:
        (S,).
    """
    around = np.column_stack([np.arange(len(labels)), neighbours])
    row, column = np.nonzero(around >= 0)
    for _ in range(rounds):
        votes = np.zeros((len(labels), int(labels.max()) + 1))
        np.add.at(votes, (row, labels[around[row, column]]), 1.0)
        votes[np.arange(len(labels)), labels] += 0.5
        labels = votes.argmax(axis=1)
    return labels


def cluster(
    rows: np.ndarray, n_clusters: int, method: str, config: DomainsConfig, seed: int
) -> np.ndarray:
    """Cluster names (S,) by ``kmeans`` or by a Gaussian mixture with one tied covariance."""
    if method == "kmeans":
        means = KMeans(n_clusters, n_init=config.n_init, random_state=seed)
        return np.asarray(means.fit_predict(rows))
    mixture = GaussianMixture(n_clusters, covariance_type="tied", max_iter=200, random_state=seed)
    return np.asarray(mixture.fit_predict(rows))


def _labelled(
    slide: SlideData, config: DomainsConfig, table: ResultTable
) -> Iterator[tuple[SlideData, str, np.ndarray]]:
    """Label columns of a slide with at least two classes of enough spots."""
    for column in slide.label_columns:
        truth = slide.categories(column)
        names, size = np.unique(truth[truth != ""].astype(str), return_counts=True)
        small = names[size < config.min_spots].tolist()
        if len(names) - len(small) < 2:
            continue
        if small:
            where = f"slide {slide.slide_id}, column {column}"
            table.note(f"{where}: classes below {config.min_spots} spots left out: {small}")
        yield slide, column, np.where(np.isin(truth.astype(str), small), "", truth)


def _add(
    table: ResultTable,
    where: tuple[str, str, str],
    case: tuple[SlideData, np.ndarray, np.ndarray],
    config: DomainsConfig,
) -> None:
    slide, truth, rows = case
    kept = truth != ""
    names = truth[kept].astype(str)
    near = slide.neighbours[:, : config.n_neighbours]
    spaces = {"": _components(rows, config)}
    try:
        spaces["_graph"] = spatial_axes(spaces[""], near, config.graph_components)
    except FoldError as error:
        model, modality, _ = where
        table.note(f"slide {slide.slide_id}: no _graph rows for {model}, {modality}: {error}")
    smoothed = {f"{name}_smooth": smooth(one, near, config.rounds) for name, one in spaces.items()}
    own = _among(near, kept)
    for method in ("kmeans", "gmm"):
        for suffix, values in (spaces | smoothed).items():
            found = [
                cluster(values[kept], len(set(names)), method, config, seed)
                for seed in range(config.n_seeds)
            ]
            _add_scores(table, where, f"{method}{suffix}", names, found)
            if not suffix:
                voted = [smooth_labels(one, own, config.label_rounds) for one in found]
                _add_scores(table, where, f"{method}_label_smooth", names, voted)


def _add_scores(
    table: ResultTable,
    where: tuple[str, str, str],
    method: str,
    truth: np.ndarray,
    found: list[np.ndarray],
) -> None:
    """Every score of one clustering, its mean over the cluster seeds."""
    model, modality, key = where
    for score, function in SCORES.items():
        mean = float(np.mean([function(truth, labels) for labels in found]))
        known = score in ADJUSTED and not method.endswith("_smooth")  # smoothed noise is above 0
        chance = 0.0 if known else None
        table.add(model, _measure(modality, score, method), key, mean, chance)


def _measure(modality: str, score: str, method: str) -> Measure:
    words = [WORDS[score]]
    words += [text for part, text in METHODS.items() if part in method]
    if method.endswith("_smooth") and not method.endswith("_label_smooth"):
        words.append("smooth: embeddings averaged over neighbouring spots before clustering")
    unit = f"{score.upper()} per slide and label column"
    return Measure(f"{modality}_{score}/{method}", unit, words=tuple(words))


def _among(neighbours: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Neighbour lists of the kept spots in their own numbering; others become -1."""
    number = np.full(len(kept) + 1, -1)  # the last entry answers index -1
    number[np.flatnonzero(kept)] = np.arange(int(kept.sum()))
    return np.asarray(number[neighbours[kept]])


def _components(rows: np.ndarray, config: DomainsConfig) -> np.ndarray:
    """Leading components, on a scale where the widest has standard deviation 1."""
    size = min(config.n_components, len(rows) - 1)
    centred = rows - rows.mean(axis=0)
    if rows.shape[1] > size:
        centred = PCA(size, random_state=0).fit_transform(centred)
    return np.asarray(centred / max(float(centred.std(axis=0).max()), 1e-12))
