"""The image side of a read-out: training and test embeddings of one model, standardised per slide.

Standardising a test slide uses its own embeddings but no label and no count (METHOD section 5).
Shapes: S spots of all slides stacked, D dimensions, T targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.fold import Fold, Representation, SlideData, spot_names, stack
from eval.readouts import RidgeConfig, centre, inner_groups, knn_mean, ridge_fit_predict, zscore


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
        """Targets (S', T) of the test spots by PCA + ridge.

        Args:
            target: (S, T) of the training spots.
            config: of the ridge.
            alpha: ``cv``, ``hest`` or a number.
            beside: another model whose features stand beside these.
        """
        train, test = self.train_z, self.test_z
        if beside is not None:
            train, test = np.hstack([beside.train_z, train]), np.hstack([beside.test_z, test])
        return ridge_fit_predict(train, target, test, alpha, self.groups, self.units, config)

    def nearest(self, target: np.ndarray, k: int) -> np.ndarray:
        """Targets (S', T) as the mean over the k most similar training spots."""
        return knn_mean(self.train_centred, target, self.test_centred, k)


def split_rows(rows: np.ndarray, slides: Sequence[SlideData]) -> list[np.ndarray]:
    """Stacked rows cut back into slides."""
    return np.split(rows, np.cumsum([slide.n_spots for slide in slides])[:-1])
