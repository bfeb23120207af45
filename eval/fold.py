"""What an evaluation task sees: slides, embeddings of them, and which slides are the training ones.

Every task runs the same code on the model and on its baselines, because a baseline is a
`Representation` like any other. Nothing here fits anything on test slides; where a number is
standardised per slide, no label is used (METHOD section 6).

Shapes: S spots of one slide, G genes, D embedding dimensions, M pathways, k neighbours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import sparse

from eval.representation import Cost, Prediction, Representation
from eval.slide_data import ACTIVITY_PREFIX, NOT_A_LABEL, FoldError, SlideData

if TYPE_CHECKING:
    from eval.hidden_genes import HiddenGenes

__all__ = [
    "ACTIVITY_PREFIX",
    "NOT_A_LABEL",
    "Cost",
    "Fold",
    "FoldError",
    "GeneSetScores",
    "Prediction",
    "Representation",
    "SlideData",
    "neighbour_mean",
    "neighbour_weights",
    "spot_names",
    "stack",
]


class GeneSetScores(Protocol):
    """Gene sets that can be scored on TF-IDF rows; `pathways.anchors.PathwayAnchors` is one."""

    @property
    def names(self) -> Sequence[str]:
        """The M set names, in column order."""
        ...

    def match(self, tfidf: sparse.csr_matrix) -> np.ndarray:
        """Score (S, M), standardised per set over training spots, centred per spot."""
        ...


@dataclass(frozen=True)
class Fold:
    """One split by patient under one seed, with every model's embedding of its slides.

    Args:
        name: name of the split, for example the held-out patient.
        seed: seed of the trained models; also the seed of what a task draws at random.
        genes: (G,) names of the gene vocabulary.
        train: slides that models and read-outs may be fitted on.
        test: slides of other patients.
        models: the checkpoint's and the baselines' embeddings.
        anchors: pathways scored on TF-IDF rows, standardised on the training spots, or None.
        held_out: gene sets never seen in training, in the same form, or None.
        random_sets: random sets matched to ``anchors`` in size and mean expression, or None.
        factors: gene factors with ``components`` (G, r) and ``spread`` (r,), or None.
        hidden: genes to impute, and every representation without them, or None.
        per_slide: models fitted anew on every slide, each in a space of its own; only tasks that
            stay within a slide can score them.
        raw_features: stored image features and, as their omics side, the spot vector, which
            read-outs of expression and retrieval put beside an embedding; scored only where
            ``models`` has them too. None: those in ``models``, if any.
    """

    name: str
    seed: int
    genes: np.ndarray
    train: tuple[SlideData, ...]
    test: tuple[SlideData, ...]
    models: tuple[Representation, ...] = ()
    anchors: GeneSetScores | None = None
    held_out: GeneSetScores | None = None
    random_sets: GeneSetScores | None = None
    factors: Any = field(default=None, repr=False)
    hidden: "HiddenGenes | None" = field(default=None, repr=False)
    per_slide: tuple[Representation, ...] = ()
    raw_features: Representation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for slide in (*self.train, *self.test):
            if slide.counts.shape[1] != len(self.genes):
                raise FoldError(
                    f"slide {slide.slide_id} has {slide.counts.shape[1]} genes, fold {self.name} "
                    f"has {len(self.genes)}; align the columns to the fold's vocabulary"
                )
        _reject_repeats("slide", [s.slide_id for s in (*self.train, *self.test)], self.name)
        _reject_repeats("model", [m.name for m in (*self.models, *self.per_slide)], self.name)

    @property
    def paired_train(self) -> tuple[SlideData, ...]:
        """Training slides with an image."""
        return tuple(slide for slide in self.train if slide.has_image)

    @property
    def paired_test(self) -> tuple[SlideData, ...]:
        """Test slides with an image."""
        return tuple(slide for slide in self.test if slide.has_image)

    def model(self, name: str) -> Representation:
        """The representation of this name.

        Raises:
            FoldError: unknown name; the nearest one is suggested.
        """
        names = [model.name for model in self.models]
        if name in names:
            return self.models[names.index(name)]
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FoldError(f"fold {self.name} has no model {name!r}; it has {names}{hint}")

    def has_model(self, name: str) -> bool:
        """Whether a representation of this name is there."""
        return any(model.name == name for model in self.models)

    def key(self, unit: str) -> str:
        """Key of one value: ``fold/seed/unit``, unit being a slide, a patient or ``pooled``."""
        return f"{self.name}/{self.seed}/{unit}"


def neighbour_mean(values: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Mean over the spatial neighbours of each spot, itself not included.

    Args:
        values: (S, F).
        neighbours: (S, k) indices padded with -1.

    Returns:
        (S, F); a spot without neighbours keeps its own values.
    """
    weights = neighbour_weights(neighbours)
    lonely = np.asarray(weights.sum(axis=1)).ravel() == 0
    mean = np.asarray(weights @ values)
    return np.where(lonely[:, None], values, mean)


def neighbour_weights(neighbours: np.ndarray) -> sparse.csr_matrix:
    """Averaging matrix (S, S): 1/degree on each spot's neighbours, rows of zeros where none."""
    present = neighbours >= 0
    degree = present.sum(axis=1)
    row = np.repeat(np.arange(len(neighbours)), degree)
    weight = np.repeat(1.0 / np.maximum(degree, 1), degree)
    shape = (len(neighbours), len(neighbours))
    return sparse.csr_matrix((weight, (row, neighbours[present])), shape=shape)


def stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several slides below each other."""
    return np.concatenate(list(parts), axis=0)


def spot_names(slides: Iterable[SlideData], kind: str) -> np.ndarray:
    """Per spot of the stacked slides, its slide or its patient.

    Args:
        slides: the slides, in stacking order.
        kind: ``slide`` or ``patient``.

    Returns:
        (S,) names.
    """
    return np.concatenate([np.full(s.n_spots, getattr(s, f"{kind}_id"), object) for s in slides])


def _reject_repeats(kind: str, names: list[str], fold: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise FoldError(f"fold {fold} names the {kind} {repeated[0]!r} twice; names must differ")
