"""Any gene set as a query, also one never seen in training (METHOD section 2).

Shapes: S spots, G genes of the panel.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from .coverage import explain_mismatch
from .database import gene_index
from .errors import PathwayError
from .similarity import Floats, checked_idf, cosine, empty_rows


def set_vector(
    genes_of_set: Sequence[str],
    weights: npt.ArrayLike | None,
    genes: Sequence[str],
    idf: npt.ArrayLike,
) -> csr_matrix:
    """Anchor of one gene set, also one never seen in training.

    Args:
        genes_of_set: Its genes, each once; those outside the panel are left out.
        weights: Their weights, finite; None: all 1.
        genes: Panel (G,).
        idf: Inverse document frequencies (G,).

    Returns:
        CSR float32 (1, G), L2 norm 1.

    Raises:
        PathwayError: No gene is in the panel (with a diagnosis), or lengths differ.
    """
    wanted = gene_index(genes_of_set)
    values = np.ones(len(wanted)) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.shape != (len(wanted),) or not np.isfinite(values).all():
        raise PathwayError(
            f"weights of shape {values.shape} for {len(wanted)} genes; expected one finite number "
            "a gene."
        )
    column = gene_index(genes).get_indexer(wanted)
    inside = column >= 0
    values = values[inside] * checked_idf(idf, len(genes))[column[inside]]
    norm = np.linalg.norm(values)
    if not norm > 0:
        raise PathwayError(
            f"{int(inside.sum())} of {len(wanted)} genes of the set are in the panel with a weight "
            f"and idf other than 0. {explain_mismatch(wanted, genes)}"
        )
    data = (values / norm).astype(np.float32)
    row = np.zeros(len(data), dtype=np.int64)
    return csr_matrix((data, (row, column[inside])), shape=(1, len(genes)))


def raw_score(tfidf: csr_matrix, vector: csr_matrix) -> Floats:
    """Cosine (S,) of spots with one set vector; its mean and sd on training spots standardise."""
    return cosine(tfidf, csr_matrix(vector.T))[:, 0]


def score_set(
    tfidf: csr_matrix,
    vector: csr_matrix,
    mean: float,
    sd: float,
    background: npt.ArrayLike,
) -> Floats:
    """Score of one set on the scale of ``PathwayAnchors.match``.

    Args:
        tfidf: TF-IDF rows (S, G), L2-normalised.
        vector: Unit row (1, G) from ``set_vector``.
        mean: Mean of ``raw_score`` over training spots.
        sd: Its standard deviation, > 0.
        background: Per-spot mean of the database's standardised scores (S,), from
            ``PathwayAnchors.background``.

    Returns:
        float32 (S,); 0 for a spot without counts.

    Raises:
        PathwayError: sd is not positive, or background has another length.
    """
    level = np.asarray(background, dtype=np.float64)
    if not sd > 0 or level.shape != (tfidf.shape[0],):
        raise PathwayError(
            f"sd={sd}, background of shape {level.shape} for {tfidf.shape[0]} spots; expected "
            "sd > 0 (a set that varies over the training spots) and one background a spot."
        )
    score = (raw_score(tfidf, vector) - mean) / sd - level
    score[empty_rows(tfidf)] = 0.0
    return score.astype(np.float32)
