"""Few-shot annotation: how many labelled spots a linear probe needs (METHOD section 6.4).

``<modality>/few_shot@k``: balanced accuracy in every test patient of a probe fitted on k labelled
spots of each class, drawn from the training patients together; several draws, one value a test
patient, label column and draw (the key ends in ``:draw<i>``). Models of one modality get the same
spots, and a larger k keeps those of a smaller one. The penalty is fixed: there is nothing to choose
it on. Shapes: S training and Q test spots, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from eval.fold import FoldError
from eval.metrics import balanced_accuracy

METRIC = "few_shot"


@dataclass(frozen=True)
class FewShotConfig:
    """Settings of the curves.

    Args:
        k: labelled spots of each class; of a rarer class all are taken. Empty: no curves.
        draws: random draws of the spots for each k.
        c: inverse penalty of the probe, whose features have standard deviation 1.
        max_iter: of its solver.
    """

    k: tuple[int, ...] = (1, 2, 5, 10, 20)
    draws: int = 5
    c: float = 0.1
    max_iter: int = 300

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.k) or self.draws < 1:
            raise FoldError(f"few-shot k {self.k}, draws {self.draws}; all must be at least 1")


@dataclass(frozen=True)
class FewShotScore:
    """Balanced accuracy in one test patient after one draw of k spots a class."""

    k: int
    draw: int
    patient: str
    value: float
    chance: float


def draw_spots(classes: np.ndarray, k: int, seed: Sequence[int]) -> np.ndarray:
    """Indices of k random spots of each class, of a rarer class all of them, sorted.

    Args:
        classes: (S,) class of each spot.
        k: spots of each class.
        seed: of the draw; the spots of a smaller k are among those of a larger one.
    """
    rank = np.random.default_rng(list(seed)).random(len(classes))
    members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
    chosen = [own[np.argsort(rank[own], kind="stable")[:k]] for own in members]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def few_shot_scores(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray, np.ndarray],
    seed: int,
    config: FewShotConfig,
) -> Iterator[FewShotScore]:
    """Fit on few spots, score every test patient.

    Args:
        train: features (S, D) and class (S,) of the labelled training spots.
        test: features (Q, D), class (Q,) and patient (Q,) of test spots whose class occurs in
            training.
        seed: of the draws.
        config: settings.
    """
    x, y = train
    test_x, test_y, patient = test
    for k in config.k:
        for draw in range(config.draws):
            few = draw_spots(y, k, (seed, draw))
            probe = LogisticRegression(
                C=config.c, class_weight="balanced", max_iter=config.max_iter
            )
            found = probe.fit(x[few], y[few]).predict(test_x)
            for name in np.unique(patient):
                own = patient == name
                value = balanced_accuracy(test_y[own], found[own])
                yield FewShotScore(k, draw, str(name), value, 1.0 / len(set(test_y[own])))
