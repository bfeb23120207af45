"""Expression values of counts and of intensities, row by row (docs/method.md 0).

RNA counts are divided by the depth of their spot, intensities are not: a cell that stains weakly is
no cell that was sampled less. Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import sparse

from preprocessing.errors import DataError, unknown_name
from preprocessing.spot_table import PROTEIN, RNA
from preprocessing.tfidf.weights import checked_counts

COFACTOR = 5.0  # intensities far below it count about linearly, far above it by their logarithm


def log_normalise(counts: Any) -> sparse.csr_matrix:
    """ln(1 + 10^4 x / depth), the usual expression value of RNA counts (S, G), CSR or dense.

    A spot without counts stays 0.

    Raises:
        DataError: a negative or non-finite value.
    """
    table = checked_counts(counts)
    depth = np.asarray(table.sum(axis=1)).ravel()
    share = table.data / np.repeat(depth, np.diff(table.indptr))
    return _with_values(table, np.log1p(1e4 * share))


def intensity(counts: Any, cofactor: float = COFACTOR) -> sparse.csr_matrix:
    """arcsinh(x / cofactor), the usual value of protein intensities; no depth scaling.

    Args:
        counts: (S, G) raw intensities, CSR or dense.
        cofactor: intensity at which the scale turns from linear to logarithmic; 5 is usual for
            mass cytometry and imaging, 150 for flow cytometry.

    Raises:
        DataError: a negative or non-finite value, or a cofactor that is not positive.
    """
    if not 0 < cofactor < np.inf:
        raise DataError(f"cofactor is {cofactor}, expected a positive number (5 is usual).")
    table = checked_counts(counts)
    return _with_values(table, np.arcsinh(table.data / cofactor))


#: How the values of a modality become expression values.
MODALITIES: Mapping[str, Callable[[Any], sparse.csr_matrix]] = MappingProxyType(
    {RNA: log_normalise, PROTEIN: intensity}
)


def normalised(counts: Any, modality: str) -> sparse.csr_matrix:
    """Expression values (S, G), float32: `log_normalise` of RNA, `intensity` of proteins.

    Raises:
        DataError: unknown modality, or a negative or non-finite value.
    """
    if modality not in MODALITIES:
        raise unknown_name("modality", modality, MODALITIES)
    return MODALITIES[modality](counts)


def _with_values(table: sparse.csr_matrix, values: Any) -> sparse.csr_matrix:
    parts = (values.astype(np.float32), table.indices.copy(), table.indptr.copy())
    return sparse.csr_matrix(parts, shape=table.shape)
