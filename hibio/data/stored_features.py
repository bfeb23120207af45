"""Features of a slide, standardised over it, in memory or in its store.

Legend: S spots, n spots asked for, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hibio.data.counts import reading
from preprocessing.store import SlideStore

COLUMNS = 8  # that are standardised at once: of a large slide a copy in float64 weighs much
FEATURE_ROWS = 2048  # that are read at once


def standardise_columns(values: np.ndarray) -> np.ndarray:
    """Columns to mean 0 and sd 1 over the spots of one slide; constant columns become 0."""
    values = np.asarray(values)
    found = np.empty(values.shape, dtype=np.float32)
    for start in range(0, values.shape[1], COLUMNS):
        some = np.s_[:, start : start + COLUMNS]
        part = values[some].astype(np.float64)
        sd = part.std(axis=0)
        part -= part.mean(axis=0)
        found[some] = part / np.where(sd > 1e-8, sd, np.inf)
    return found


def blocks(n_spots: int) -> list[slice]:
    """Rows that are read at once."""
    return [slice(at, at + FEATURE_ROWS) for at in range(0, n_spots, FEATURE_ROWS)]


@dataclass(frozen=True)
class StoredFeatures:
    """Features of one store, standardised over the slide, read for the spots that are asked for.

    To be used like the array (S, F) float32 that `standardise_columns` gives of them.

    Attributes:
        path: the store.
        name: of the features.
        shape: (S, F).
        mean, sd: (F,) float64 over the slide; sd is inf for a constant column.
    """

    path: Path
    name: str
    shape: tuple[int, int]
    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, store: SlideStore, name: str) -> StoredFeatures:
        """Read them once, block by block, for mean and spread.

        Raises:
            DataError: no features of this name, or not all are finite.
        """
        mean, square = np.zeros(1), np.zeros(1)
        for rows in blocks(store.n_spots):
            part = store.features(name, rows).astype(np.float64)
            own, n, start = part.mean(axis=0), len(part), rows.start
            apart = own - mean
            square = square + ((part - own) ** 2).sum(axis=0) + apart**2 * start * n / (start + n)
            mean = mean + apart * n / (start + n)
        sd = np.sqrt(square / max(store.n_spots, 1))
        sd = np.where(sd > 1e-8, sd, np.inf)
        return cls(store.path, name, (store.n_spots, len(mean)), mean, sd)

    def __getitem__(self, spots: slice | np.ndarray) -> np.ndarray:
        """Rows (n, F) float32 of some spots."""
        with reading(self.path), SlideStore(self.path) as store:
            values = store.features(self.name, spots)
        return ((values - self.mean) / self.sd).astype(np.float32)
