"""The two sides that retrieval compares: image and omics rows of every test slide, in one space.

Shapes: N spots, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.fold import Fold, FoldError, Representation, SlideData, neighbour_weights, stack
from eval.metrics import unit_rows
from eval.readouts import RidgeConfig, centre
from eval.tasks.image_probe import ImageProbe, split_rows


@dataclass(frozen=True)
class Pairs:
    """Image and omics embeddings (N, D) of each test slide, centred per slide, in one space."""

    name: str
    image: list[np.ndarray]
    omics: list[np.ndarray]


def pairs_of(fold: Fold, model: Representation, target: str, ridge: RidgeConfig) -> Pairs | None:
    """The sides of one model; None where it has no image side, or nothing to bridge it to.

    Args:
        fold: its test slides are compared.
        model: in one space, or bridged by ridge from its image features to the spot vector.
        target: name of the model whose omics side is the spot vector.
        ridge: of the bridge.

    Raises:
        FoldError: the sides of an aligned model differ in their dimensions.
    """
    if model.image is None:
        return None
    if not model.aligned:
        return _bridged(fold, model, _raw(fold, target), target, ridge)
    if model.omics is None:
        return None
    image, omics = model.rows("image", fold.paired_test), model.rows("omics", fold.paired_test)
    if image[0].shape[1] != omics[0].shape[1]:
        raise FoldError(
            f"{model.name}: image embeddings have {image[0].shape[1]} dimensions and omics "
            f"{omics[0].shape[1]}; give one space, or aligned=False to bridge them by ridge"
        )
    return Pairs(model.name, [centre(x) for x in image], [centre(x) for x in omics])


def raw_bridge(fold: Fold, target: str, ridge: RidgeConfig) -> Pairs | None:
    """Raw image features bridged to the spot vector; None where either is not there."""
    raw = _raw(fold, target)
    return None if raw is None else _bridged(fold, raw, raw, target, ridge)


def side_by_side(own: Pairs, bridge: Pairs) -> Pairs:
    """Unit rows of both, concatenated: the cosine is the mean of both, for rows other than 0."""
    image, omics = (
        [np.hstack([unit_rows(a), unit_rows(b)]) for a, b in zip(left, right, strict=True)]
        for left, right in ((own.image, bridge.image), (own.omics, bridge.omics))
    )
    return Pairs(own.name, image, omics)


def averaged(pairs: Pairs, graph: list[np.ndarray] | None) -> Pairs:
    """Both sides averaged over the spot and its listed neighbours, unit rows first."""
    if graph is None:
        return pairs
    image = [_niche(x, lists) for x, lists in zip(pairs.image, graph, strict=True)]
    omics = [_niche(x, lists) for x, lists in zip(pairs.omics, graph, strict=True)]
    return Pairs(pairs.name, image, omics)


def item_graphs(
    slides: tuple[SlideData, ...], item: str, seed: int
) -> Iterator[tuple[str, list[np.ndarray] | None]]:
    """Metric suffix and neighbour lists that make the item; None keeps the spot."""
    if item == "spot":
        yield "", None
        return
    yield "", [slide.neighbours for slide in slides]
    rng = np.random.default_rng(seed)
    random = [
        np.where(s.neighbours >= 0, rng.integers(s.n_spots, size=s.neighbours.shape), -1)
        for s in slides
    ]
    yield "_random_graph", random


def _raw(fold: Fold, target: str) -> Representation | None:
    return fold.model(target) if fold.has_model(target) else fold.raw_features


def _bridged(
    fold: Fold,
    model: Representation,
    known: Representation | None,
    target: str,
    ridge: RidgeConfig,
) -> Pairs | None:
    """Ridge from image features to the spot vector, fitted on the training slides."""
    if known is None or known.omics is None or not fold.paired_train:
        return None
    train = stack(known.rows("omics", fold.paired_train))
    predicted = ImageProbe.of(fold, model).ridge(train, ridge)
    name = "ridge_to_lsa" if model.name == target else model.name
    truth = known.rows("omics", fold.paired_test)
    image = [centre(x) for x in split_rows(predicted, fold.paired_test)]
    return Pairs(name, image, [centre(x) for x in truth])


def _niche(rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    degree = (neighbours >= 0).sum(axis=1, keepdims=True)
    unit = unit_rows(rows)
    return np.asarray((unit + degree * (neighbour_weights(neighbours) @ unit)) / (1 + degree))
