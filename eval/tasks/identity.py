"""Can the slide or the patient be read off an image embedding? Lower is better (METHOD 5).

Shapes: S spots of all slides, D dimensions.
"""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from eval.fold import SlideData, stack
from eval.metrics import balanced_accuracy
from eval.readouts import spatial_blocks, zscore


def identity_accuracy(
    embeddings: list[np.ndarray],
    slides: tuple[SlideData, ...],
    kind: str,
    max_spots: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Balanced accuracy of a logistic probe, on blocks of tissue it was not fitted on.

    The folds are spatial blocks within slides, so that a spot's neighbours do not give it away.

    Args:
        embeddings: (S, D) per slide, as the model gives them (not centred per slide).
        slides: the slides.
        kind: ``slide`` or ``patient``.
        max_spots: spots drawn per slide.
        seed: of the draw.

    Returns:
        Balanced accuracy, and chance (1 / number of names); NaN with fewer than two names.
    """
    names = [getattr(slide, f"{kind}_id") for slide in slides]
    n_names = len(set(names))
    if n_names < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows, truth, fold = [], [], []
    for name, slide, values in zip(names, slides, embeddings, strict=True):
        pick = rng.permutation(slide.n_spots)[:max_spots]
        rows.append(values[pick])
        truth.append(np.full(len(pick), name, dtype=object))
        fold.append((spatial_blocks(slide.xy_um) % 3)[pick])
    predicted = _cross_predict(stack(rows), np.concatenate(truth), np.concatenate(fold), seed)
    return balanced_accuracy(np.concatenate(truth).astype(str), predicted), 1.0 / n_names


def _cross_predict(rows: np.ndarray, truth: np.ndarray, fold: np.ndarray, seed: int) -> np.ndarray:
    rows = zscore(rows)
    if rows.shape[1] > 50:
        rows = zscore(PCA(50, random_state=seed).fit_transform(rows))
    predicted = np.empty(len(rows), dtype=object)
    for held in np.unique(fold):
        own = fold == held
        probe = LogisticRegression(C=1.0, max_iter=500, class_weight="balanced")
        probe.fit(rows[~own], truth[~own].astype(str))
        predicted[own] = probe.predict(rows[own])
    return predicted.astype(str)
