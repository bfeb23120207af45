"""The measured side of one slide: counts, coordinates, neighbours and labels.

Shapes: S spots of one slide, G genes, k neighbours.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from preprocessing.errors import DataError

ACTIVITY_PREFIX = "activity:"
NOT_A_LABEL = ("", "undetermined", "unknown", "nan", "na")


class FoldError(DataError):
    """A fold lacks what a task needs, or its arrays do not fit together."""


@dataclass(frozen=True)
class SlideData:
    """The measured side of one slide, aligned to the gene vocabulary of the fold.

    Args:
        slide_id: name of the slide, unique in the fold.
        patient_id: splits are made by this name.
        counts: (S, G) raw counts.
        tfidf: (S, G) rows of the training TF-IDF (METHOD section 1).
        xy_um: (S, 2) spot centres in micrometres.
        neighbours: (S, k) indices of spatial neighbours, nearest first, padded with -1.
        labels: S rows; string columns are categories, float columns are measurements, of which
            ``activity:<NAME>`` is the planted activity of the gene set NAME.
        has_image: whether image embeddings exist for this slide.
        modality: ``rna`` (counts) or ``protein`` (intensities).
        outcome: of the patient, free text; "" is unknown.
    """

    slide_id: str
    patient_id: str
    counts: sparse.csr_matrix
    tfidf: sparse.csr_matrix
    xy_um: np.ndarray
    neighbours: np.ndarray
    labels: pd.DataFrame
    has_image: bool = True
    modality: str = "rna"
    outcome: str = ""

    def __post_init__(self) -> None:
        n_spots = self.counts.shape[0]
        sizes = {
            "tfidf": self.tfidf.shape[0],
            "xy_um": len(self.xy_um),
            "neighbours": len(self.neighbours),
            "labels": len(self.labels),
        }
        wrong = {name: size for name, size in sizes.items() if size != n_spots}
        if wrong:
            raise FoldError(
                f"slide {self.slide_id}: counts have {n_spots} rows but {wrong}; "
                "all tables of a slide must list the same spots in the same order"
            )
        if self.neighbours.size and int(self.neighbours.max()) >= n_spots:
            raise FoldError(
                f"slide {self.slide_id}: neighbour index {int(self.neighbours.max())} but only "
                f"{n_spots} spots; pad missing neighbours with -1"
            )

    @property
    def n_spots(self) -> int:
        """Number of spots S."""
        return int(self.counts.shape[0])

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of the category columns."""
        return tuple(str(c) for c in self.labels if not _is_number(self.labels[c]))

    @property
    def measurement_columns(self) -> tuple[str, ...]:
        """Names of the float columns."""
        return tuple(str(c) for c in self.labels if _is_number(self.labels[c]))

    def categories(self, column: str) -> np.ndarray:
        """Labels (S,) of a column; missing and undetermined ones are the empty string."""
        if column not in self.labels:
            return np.full(self.n_spots, "", dtype=object)
        values = self.labels[column].fillna("").astype(str).str.strip()
        return np.where(values.str.lower().isin(NOT_A_LABEL), "", values).astype(object)


def _is_number(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column))
