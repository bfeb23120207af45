"""Spatial domains, or niches of cells, by clustering frozen embeddings (METHOD sections 6.3 and 7).

Metrics ``omics_ari/kmeans``, ``omics_ari/gmm``, both also with ``_smooth`` (embeddings averaged
over neighbours before clustering), ``_label_smooth`` (cluster labels replaced by the majority of
the neighbours afterwards), ``_graph`` (axes of the embedding in order of spatial smoothness, see
`eval.spatial_axes`, fitted on the slide without labels) and ``_graph_smooth`` (those axes averaged
over neighbours); the same with ``nmi`` and ``ami``, and with ``image_`` for the image embedding;
one value per test slide and label column.
Shapes: S spots, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from eval.fold import Fold, FoldError, Representation, SlideData, neighbour_weights
from eval.metrics import ami, ari, nmi
from eval.results import ResultTable, TaskResult
from eval.spatial_axes import spatial_axes

MODALITIES = ("omics", "image")
SCORES = {"ari": ari, "nmi": nmi, "ami": ami}
ADJUSTED = ("ari", "ami")  # random clusters score 0


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

    n_components: int = 30
    rounds: int = 4
    label_rounds: int = 1
    graph_components: int = 15
    n_neighbours: int = 6
    n_seeds: int = 3
    n_init: int = 5
    min_spots: int = 10


def run(fold: Fold, config: DomainsConfig) -> TaskResult:
    """Cluster every test slide with K = its number of labels and compare with the labels."""
    table = ResultTable("domains")
    cases = [case for slide in fold.test for case in _labelled(slide, config, table)]
    if not cases:
        table.note(f"fold {fold.name}: no test slide has a column with two classes; not run")
    models = (*fold.models, *fold.per_slide)
    for model in models:
        for modality in MODALITIES:
            for slide, column, truth in cases:
                if _has(model, modality, slide):
                    rows = model.rows(modality, [slide])[0]
                    where = (model.name, modality, fold.key(f"{slide.slide_id}:{column}"))
                    _add(table, where, (slide, truth, rows), config)
    return table.result(models)


def smooth(rows: np.ndarray, neighbours: np.ndarray, rounds: int) -> np.ndarray:
    """Repeated mean of each spot and its neighbours.

    Args:
        rows: (S, D).
        neighbours: (S, k) padded with -1.
        rounds: repetitions.

    Returns:
        (S, D).
    """
    weights = neighbour_weights(neighbours)
    degree = (neighbours >= 0).sum(axis=1, keepdims=True)
    for _ in range(rounds):
        rows = (rows + degree * (weights @ rows)) / (1 + degree)
    return rows


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


def _has(model: Representation, modality: str, slide: SlideData) -> bool:
    if modality == "image":
        return model.image is not None and slide.has_image
    return model.omics is not None


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
        unit = f"{score.upper()} per slide and label column"
        known = score in ADJUSTED and not method.endswith("_smooth")  # smoothed noise is above 0
        chance = 0.0 if known else None
        table.add(model, f"{modality}_{score}/{method}", key, mean, unit, chance)


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
