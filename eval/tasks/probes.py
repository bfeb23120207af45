"""The two sides of a read-out: training and test embeddings of one model in one space.

Standardising a test slide uses its own embeddings but no label and no count (docs/method.md 5).
Shapes: S spots of all slides stacked, N spots of one slide, D dimensions, T targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation, SlideData, split_rows, spot_names, stack
from eval.measures.metrics import unit_rows
from eval.measures.ridge import (
    RidgeConfig,
    centre,
    inner_groups,
    knn_mean,
    ridge_fit_predict,
    zscore,
)
from preprocessing.graphs import smooth

BRIDGED = "ridge_to_lsa"  # the row of raw features that ridge turns into the spot vector


@dataclass(frozen=True)
class ImageProbe:
    """What ridge and nearest-spot read-outs need of one model in one fold.

    Args:
        train_z: (S, D) training embeddings, z-scored per slide (ridge).
        test_z: (S', D) the same for test slides.
        train_centred: (S, D) centred per slide (cosine).
        test_centred: (S', D) the same for test slides.
        groups: (S,) inner folds never split these.
        units: (S,) slide of each training spot.
    """

    train_z: np.ndarray
    test_z: np.ndarray
    train_centred: np.ndarray
    test_centred: np.ndarray
    groups: np.ndarray
    units: np.ndarray

    @staticmethod
    def of(fold: Fold, model: Representation) -> "ImageProbe":
        """Probe of a model's image embedding on the slides of a fold that have an image."""
        train = model.rows("image", fold.paired_train)
        test = model.rows("image", fold.paired_test)
        slides = spot_names(fold.paired_train, "slide")
        xy_um = stack([slide.xy_um for slide in fold.paired_train])
        return ImageProbe(
            train_z=stack([zscore(rows) for rows in train]),
            test_z=stack([zscore(rows) for rows in test]),
            train_centred=stack([centre(rows) for rows in train]),
            test_centred=stack([centre(rows) for rows in test]),
            groups=inner_groups(spot_names(fold.paired_train, "patient"), slides, xy_um),
            units=slides,
        )

    def ridge(
        self,
        target: np.ndarray,
        config: RidgeConfig,
        alpha: float | str = "cv",
        beside: "ImageProbe | None" = None,
    ) -> np.ndarray:
        """Targets (S', T) of the test spots by PCA + ridge from those (S, T) of training spots.

        ``beside`` is another model whose features stand beside these; see `ridge_fit_predict`.
        """
        train, test = self.train_z, self.test_z
        if beside is not None:
            train, test = np.hstack([beside.train_z, train]), np.hstack([beside.test_z, test])
        return ridge_fit_predict(train, target, test, alpha, self.groups, self.units, config)

    def nearest(self, target: np.ndarray, k: int) -> np.ndarray:
        """Targets (S', T) as the mean over the k most similar training spots."""
        return knn_mean(self.train_centred, target, self.test_centred, k)


@dataclass(frozen=True)
class Pairs:
    """Image and omics embeddings (N, D) of each test slide, centred per slide, in one space."""

    name: str
    image: list[np.ndarray]
    omics: list[np.ndarray]


def pairs_of(fold: Fold, model: Representation, target: str, ridge: RidgeConfig) -> Pairs | None:
    """The sides of one model; None where it has no image side, or nothing to bridge it to.

    A model whose sides share no space is bridged by ridge from its image features to the spot
    vector, the omics side of the model ``target``.

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
    image, omics = (
        [smooth(unit_rows(x), lists, 1) for x, lists in zip(side, graph, strict=True)]
        for side in (pairs.image, pairs.omics)
    )
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
    name = BRIDGED if model.name == target else model.name
    truth = known.rows("omics", fold.paired_test)
    image = [centre(x) for x in split_rows(predicted, fold.paired_test)]
    return Pairs(name, image, [centre(x) for x in truth])
