"""What is computed from a spot's counts alone: keyword genes, pathway targets, expression targets.

A small slide holds it in memory; of a large one it is computed from the store, for the spots of a
tile, so that memory is set by the tile. Views for training (thinned counts, genes to be guessed)
come from the same counts.

Legend: S spots, n spots asked for, K keyword genes, V spot-vector length, M pathways, H target
genes, Q query genes, G vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from hibio.artifacts import Artifacts
from hibio.data.counts import CountSource, iter_chunks
from pathways.anchors import soft_targets
from preprocessing.coexpression import spot_vectors
from preprocessing.expression import normalised

IN_MEMORY_SPOTS = 20_000  # a slide up to this size is kept whole


@dataclass(frozen=True)
class ExpressionRows:
    """Rows of some spots; see :class:`hibio.SlideBatch` for each."""

    gene_SK: np.ndarray
    value_SK: np.ndarray
    target_SM: np.ndarray
    expression_SH: np.ndarray

    def take(self, spots: np.ndarray) -> ExpressionRows:
        """The rows of ``spots``."""
        return ExpressionRows(*(getattr(self, f.name)[spots] for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class SlideExpression:
    """Expression rows of one slide on request.

    Attributes:
        source: its counts on the vocabulary.
        artifacts: fitted on training slides.
        mean_H: slide mean of each target gene.
        sd_H: its standard deviation; inf for a gene that does not vary.
        kept: all rows, or None where they are computed when asked for.
    """

    source: CountSource
    artifacts: Artifacts
    mean_H: np.ndarray
    sd_H: np.ndarray
    kept: ExpressionRows | None = None

    def rows(self, spots: np.ndarray) -> ExpressionRows:
        """Rows of ``spots``, in their order."""
        if self.kept is not None:
            return self.kept.take(spots)
        return self.compute(self.source.rows(spots))

    def compute(self, counts: sparse.csr_matrix) -> ExpressionRows:
        """Rows of counts (n, G)."""
        fitted = self.artifacts
        tfidf = fitted.tfidf.transform(counts)
        gene, value = fitted.keywords(tfidf, fitted.settings["genes"]["keyword_genes"])
        targets = _target_genes(counts, fitted)
        return ExpressionRows(
            gene.astype(np.int64),
            value,
            _pathway_targets(tfidf, fitted),
            ((targets - self.mean_H) / self.sd_H).astype(np.float32),
        )

    def thinned(
        self, spots: np.ndarray, keep: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A second view of spots: every count survives with probability ``keep``.

        Intensities are not counts and stay as they are.

        Returns:
            gene (n, K), value (n, K) and raw spot vector (n, V) of the thinned counts.
        """
        counts = self.source.rows(spots)
        if self.artifacts.modality == "rna":
            counts = counts.copy()
            counts.data = rng.binomial(counts.data.astype(np.int64), keep).astype(counts.dtype)
            counts.eliminate_zeros()
        tfidf = self.artifacts.tfidf.transform(counts)
        k = self.artifacts.settings["genes"]["keyword_genes"]
        gene, value = self.artifacts.keywords(tfidf, k)
        return gene.astype(np.int64), value, spot_vectors(tfidf, self.artifacts.factors)

    def queries(
        self, spots: np.ndarray, n_genes: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Genes to be guessed that are not among a spot's keywords, mostly unexpressed ones.

        Args:
            spots: (n,).
            n_genes: Q, drawn evenly from the vocabulary.
            rng: of the draw.

        Returns:
            gene (n, Q), padded with G where the draw met a keyword or repeats itself, and its
            TF-IDF value (n, Q).
        """
        n_vocabulary = self.artifacts.n_genes
        tfidf = self.artifacts.tfidf.transform(self.source.rows(spots))
        gene = np.sort(rng.integers(0, n_vocabulary, size=(len(spots), n_genes)), axis=1)
        value = np.asarray(tfidf[np.arange(len(spots))[:, None], gene].todense(), dtype=np.float32)
        known = np.zeros((len(spots), n_vocabulary + 1), dtype=bool)
        np.put_along_axis(known, self.rows(spots).gene_SK, True, axis=1)
        taken = np.take_along_axis(known, gene, axis=1)
        taken[:, 1:] |= gene[:, 1:] == gene[:, :-1]
        return np.where(taken, n_vocabulary, gene), np.where(taken, 0.0, value).astype(np.float32)


def read_expression(
    source: CountSource, artifacts: Artifacts
) -> tuple[SlideExpression, np.ndarray]:
    """Stream a slide once: its expression, and the raw spot vectors (S, V)."""
    vectors: list[np.ndarray] = []
    total = np.zeros(len(artifacts.target_genes))
    square = np.zeros_like(total)
    blocks: list[sparse.csr_matrix] = []
    for _, counts in iter_chunks(source):
        vectors.append(spot_vectors(artifacts.tfidf.transform(counts), artifacts.factors))
        targets = _target_genes(counts, artifacts).astype(np.float64)
        total += targets.sum(axis=0)
        square += (targets**2).sum(axis=0)
        if source.n_spots <= IN_MEMORY_SPOTS:
            blocks.append(counts)
    mean = total / source.n_spots
    sd = np.sqrt(np.maximum(square / source.n_spots - mean**2, 0.0))
    slide = SlideExpression(source, artifacts, mean, np.where(sd > 1e-6, sd, np.inf))
    if blocks:
        slide = dataclasses.replace(slide, kept=slide.compute(sparse.vstack(blocks).tocsr()))
    return slide, np.concatenate(vectors)


def _target_genes(counts: sparse.csr_matrix, artifacts: Artifacts) -> np.ndarray:
    return normalised(counts, artifacts.modality)[:, artifacts.target_genes].toarray()


def _pathway_targets(tfidf: sparse.csr_matrix, artifacts: Artifacts) -> np.ndarray:
    if artifacts.n_pathways == 0:
        return np.zeros((tfidf.shape[0], 0), dtype=np.float32)
    pathways = artifacts.settings["pathways"]
    return soft_targets(
        artifacts.anchors.match(tfidf),
        temperature=pathways["temperature"],
        top=pathways["top"],
        threshold=pathways["threshold"],
    )
