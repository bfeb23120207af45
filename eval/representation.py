"""One model's view of every slide: embeddings, and predictions where it makes them itself.

Shapes: S spots of one slide, D embedding dimensions, M pathways, H predicted genes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from eval.slide_data import FoldError, SlideData
from hibio.regions import RegionTree


@dataclass(frozen=True)
class Cost:
    """What a fitted model took, printed beside its results.

    Args:
        source: what it is, or the paper that it follows.
        n_parameters: numbers that were fitted.
        seconds: wall time of the fit, or None where it was not measured.
    """

    source: str
    n_parameters: int
    seconds: float | None = None


@dataclass(frozen=True)
class Prediction:
    """Expression that a model predicts itself from the image, without a read-out fitted here.

    Args:
        genes: (H,) indices in the gene vocabulary of the fold.
        values: slide_id -> (S, H).
    """

    genes: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Representation:
    """One model's embedding of every slide; a baseline is one too.

    Args:
        name: row name in the results; ``hibio`` is the checkpoint itself.
        image: slide_id -> (S, D) from the image alone, or None.
        omics: slide_id -> (S, D) from the counts, or None.
        notes: printed with the results.
        aligned: whether image and omics live in one space, so that their cosine means something.
            Retrieval bridges the two by ridge where they do not.
        anchor: (M, D) embeddings of the fold's pathways in the image space, or None.
        held_out_anchor: the same for the fold's held-out gene sets, or None.
        trees: slide_id -> the model's own region tree, or None.
        prediction: expression that the model predicts itself from the image alone, or None.
        cost: parameters and wall time, or None where nothing was fitted.
    """

    name: str
    image: Mapping[str, np.ndarray] | None = None
    omics: Mapping[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    aligned: bool = True
    anchor: np.ndarray | None = None
    held_out_anchor: np.ndarray | None = None
    trees: Mapping[str, RegionTree] | None = None
    prediction: Prediction | None = None
    cost: Cost | None = None

    def rows(self, modality: str, slides: Iterable[SlideData]) -> list[np.ndarray]:
        """Embeddings of the slides in order, each (S, D) float64, checked.

        Args:
            modality: ``image`` or ``omics``.
            slides: the slides asked for.

        Raises:
            FoldError: the modality or a slide is missing, sizes differ, or a value is not finite.
        """
        table = {"image": self.image, "omics": self.omics}[modality]
        if table is None:
            raise FoldError(f"{self.name} has no {modality} embedding; ask for the other one")
        return [self._checked(f"{modality} embedding", table, slide) for slide in slides]

    def predicted(self, slides: Iterable[SlideData], genes: np.ndarray) -> list[np.ndarray]:
        """The model's own prediction of some genes, slide by slide, each (S, T) float64.

        Args:
            slides: the slides asked for.
            genes: (T,) indices in the vocabulary.

        Raises:
            FoldError: it predicts nothing, or not these genes or slides; or a value is not finite.
        """
        if self.prediction is None:
            raise FoldError(f"{self.name} predicts no expression; use a read-out of its embedding")
        column = {int(gene): at for at, gene in enumerate(self.prediction.genes)}
        missing = [int(gene) for gene in genes if int(gene) not in column]
        if missing:
            raise FoldError(
                f"{self.name} predicts {len(column)} genes, but not {len(missing)} of the "
                f"{len(genes)} targets (first missing: vocabulary index {missing[0]}); fit it on "
                "as many variable genes as the expression task has"
            )
        order = [column[int(gene)] for gene in genes]
        table = self.prediction.values
        return [self._checked("prediction", table, slide)[:, order] for slide in slides]

    def _checked(self, what: str, table: Mapping[str, np.ndarray], slide: SlideData) -> np.ndarray:
        where = f"{self.name}, {what} of slide {slide.slide_id}"
        if slide.slide_id not in table:
            raise FoldError(f"{where} is missing; found {sorted(table)[:5]}; embed it first")
        rows = np.asarray(table[slide.slide_id], dtype=np.float64)
        if rows.ndim != 2 or len(rows) != slide.n_spots:
            raise FoldError(f"{where} has shape {rows.shape}, expected ({slide.n_spots}, D)")
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise FoldError(f"{where} has {bad} rows that are not finite; check the training log")
        return rows
