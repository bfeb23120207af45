"""The two sides of a read-out: training and test embeddings of one model in one space.

Standardising a test slide uses its own embeddings but no label and no count (docs/method.md 5).
Shapes: S spots of all slides stacked, N spots of one slide, D dimensions, T targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation, SlideData, split_rows, spot_names, stack
from eval.measures.inner_folds import group_folds, inner_groups
from eval.measures.metrics import unit_rows
from eval.measures.ridge import (
    ReadOut,
    RidgeConfig,
    Targets,
    centre,
    knn_mean,
    ridge_fit_predict,
    ridge_readout,
    zscore,
)
from preprocessing.graphs import smooth

BRIDGED = "ridge_to_lsa"  # the row of raw features that ridge turns into the spot vector
PLAIN, FULL = READOUTS = ("plain", "full")  # see `hibio eval --readout`


def check_readout(task: str, name: str) -> None:
    """Refuse an unknown preset of read-outs.

    Raises:
        FoldError: it is not one of `READOUTS`.
    """
    if name not in READOUTS:
        raise FoldError(f"{task} readout {name!r}; it must be one of {', '.join(READOUTS)}")


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
        alpha: float | str | None = None,
        beside: "ImageProbe | None" = None,
    ) -> np.ndarray:
        """Targets (S', T) of the test spots by PCA + ridge from those (S, T) of training spots.

        ``alpha`` stands in place of the config's; ``beside`` is another model whose features stand
        beside these; see `ridge_fit_predict`.
        """
        train, test = self._features(beside)
        alpha = config.alpha if alpha is None else alpha
        return ridge_fit_predict(train, target, test, alpha, self.groups, self.units, config)

    def ridge_readout(
        self, target: np.ndarray, config: RidgeConfig, beside: "ImageProbe | None" = None
    ) -> ReadOut:
        """The same by the config's penalty, and the training spots by inner folds."""
        train, test = self._features(beside)
        return ridge_readout(train, target, test, self.groups, self.units, config)

    def _features(self, beside: "ImageProbe | None") -> tuple[np.ndarray, np.ndarray]:
        if beside is None:
            return self.train_z, self.test_z
        return np.hstack([beside.train_z, self.train_z]), np.hstack([beside.test_z, self.test_z])

    def nearest(self, target: np.ndarray, k: int) -> np.ndarray:
        """Targets (S', T) as the mean over the k most similar training spots.

        As in ridge, targets are z-scored within each training slide and put back on their scale.
        """
        y = Targets.of(target, self.units)
        return y.back(knn_mean(self.train_centred, y.z, self.test_centred, k))

    def nearest_readout(self, target: np.ndarray, k: int, config: RidgeConfig) -> ReadOut:
        """The same, and the training spots by those outside their inner fold."""
        y = Targets.of(target, self.units)
        fold_of = group_folds(self.groups, config.n_folds)
        inner = np.zeros(target.shape)
        for fold in range(int(fold_of.max()) + 1):
            own, rest = fold_of == fold, fold_of != fold
            inner[own] = knn_mean(self.train_centred[rest], y.z[rest], self.train_centred[own], k)
        return ReadOut(self.nearest(target, k), y.back(inner))


@dataclass(frozen=True)
class Pairs:
    """Image and omics embeddings (N, D) of each slide, centred per slide, in one space.

    ``train`` are those of the training slides that the model or the bridge was fitted on, or None.
    """

    name: str
    image: list[np.ndarray]
    omics: list[np.ndarray]
    train: "Pairs | None" = None


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
    seen = {
        side: [centre(x) for x in model.rows(side, fold.paired_train)]
        for side in ("image", "omics")
    }
    train = Pairs(model.name, seen["image"], seen["omics"]) if fold.paired_train else None
    return Pairs(model.name, [centre(x) for x in image], [centre(x) for x in omics], train)


def raw_bridge(fold: Fold, target: str, ridge: RidgeConfig) -> Pairs | None:
    """Raw image features bridged to the spot vector; None where either is not there."""
    raw = _raw(fold, target)
    return None if raw is None else _bridged(fold, raw, raw, target, ridge)


def side_by_side(own: Pairs, bridge: Pairs, share: float = 0.5) -> Pairs:
    """Unit rows of both, concatenated, the first ones with a share of 0 to 1.

    The cosine is share x cosine of the first + (1 - share) x that of the second, for rows other
    than 0.
    """
    a, b = np.sqrt(share), np.sqrt(1.0 - share)
    image, omics = (
        [np.hstack([a * unit_rows(x), b * unit_rows(y)]) for x, y in zip(left, right, strict=True)]
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
    measured = known.rows("omics", fold.paired_train)
    probe = ImageProbe.of(fold, model)
    every = replace(probe, test_z=np.vstack([probe.test_z, probe.train_z]))
    slides = (*fold.paired_test, *fold.paired_train)
    image = [centre(x) for x in split_rows(every.ridge(stack(measured), ridge), slides)]
    name = BRIDGED if model.name == target else model.name
    truth = known.rows("omics", fold.paired_test)
    n = len(truth)
    train = Pairs(name, image[n:], [centre(x) for x in measured])
    return Pairs(name, image[:n], [centre(x) for x in truth], train)
