"""Extra views of a batch's spots that some training terms compare (METHOD section 3.1).

Legend: S spots, K keyword genes, V spot-vector length, Q query genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hibio.data.slide import PreparedSlide


@dataclass(frozen=True)
class Views:
    """What to compute beside the spots themselves.

    Attributes:
        rng: of every draw.
        keep_counts: share of the counts that the thinned view keeps; None for no such view.
        query_genes: genes outside the keywords that a spot is asked about.
    """

    rng: np.random.Generator
    keep_counts: float | None = None
    query_genes: int = 0


def view_arrays(slide: PreparedSlide, spots: np.ndarray, views: Views) -> dict[str, np.ndarray]:
    """Fields of :class:`hibio.SlideBatch` for the views asked for."""
    arrays: dict[str, np.ndarray] = {}
    if views.keep_counts is not None:
        gene, value, raw = slide.expression.thinned(spots, views.keep_counts, views.rng)
        vector = (raw - slide.vector_mean_V) * slide.vector_scale_V
        arrays["thinned_gene_SK"], arrays["thinned_value_SK"] = gene, value
        arrays["thinned_vector_SV"] = vector.astype(np.float32)
    if views.query_genes:
        gene, value = slide.expression.queries(spots, views.query_genes, views.rng)
        arrays["query_gene_SQ"], arrays["query_value_SQ"] = gene, value
    return arrays
