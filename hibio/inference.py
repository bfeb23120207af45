"""What a trained model is asked: embeddings of slides, gene sets and pictures, and missing values.

Nothing here depends on how spots are batched: a tile carries the halo that its core spots need.

Legend: S spots, K keyword genes, Q genes imputed together, M gene sets, D shared width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio.artifacts import Artifacts
from hibio.batch import MaskedView, SlideBatch
from hibio.config import ConfigError
from hibio.data.slide import PreparedSlide
from hibio.data.tiles import iter_tiles
from hibio.encoders.anchors import set_batch, sets_matrix
from hibio.encoders.omics import OmicsMask
from hibio.omics_views import with_queries
from preprocessing.slide_stain import StainMethod

QUERIES = 32  # genes imputed together


@dataclass(frozen=True)
class SlideEmbedding:
    """Embeddings of every spot of a slide, float32, unit rows.

    Attributes:
        image: (S, D), or None without an image.
        omics: (S, D), or None without counts.
        tower: (S, width) output of the omics tower before the projection, or None.
    """

    image: np.ndarray | None
    omics: np.ndarray | None
    tower: np.ndarray | None


class Inference(nn.Module, ABC):
    """The inference half of :class:`hibio.HiBio`, which adds towers, heads and training."""

    artifacts: Artifacts
    omics: Any
    vision: Any
    omics_head: nn.Module
    log_scale: Tensor
    stain: StainMethod  # of the patches that the vision tower reads

    @abstractmethod
    def project_omics(self, batch: SlideBatch) -> Tensor:
        """Omics embedding before normalisation, (S, D)."""

    @abstractmethod
    def project_image(self, batch: SlideBatch) -> Tensor:
        """Image embedding before normalisation, (S, D)."""

    @abstractmethod
    def masked_view(self, batch: SlideBatch, mask: OmicsMask) -> MaskedView:
        """Predictions from the masked omics view."""

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode before comes back."""
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(was_training)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    @property
    def halo(self) -> int:
        """Hops of the spatial graph that an embedding depends on."""
        return int(getattr(self.omics, "hops", 1))

    def encode_slide(self, slide: PreparedSlide, tile_spots: int = 1024) -> SlideEmbedding:
        """Embed every spot; the result does not depend on ``tile_spots``."""
        image, omics, tower = [], [], []
        with self._evaluating():
            for _, batch in iter_tiles(slide, self.halo, tile_spots):
                batch = batch.to(self.device)
                if slide.has_counts:
                    tower_SD = self.omics(batch)[batch.core_S]
                    tower.append(tower_SD)
                    omics.append(F.normalize(self.omics_head(tower_SD), dim=1))
                if self.vision is not None and batch.has_image:
                    image.append(F.normalize(self.project_image(batch)[batch.core_S], dim=1))
        return SlideEmbedding(*(_numpy(torch.cat(x)) if x else None for x in (image, omics, tower)))

    def impute(
        self, slide: PreparedSlide, genes: Sequence[str], tile_spots: int = 1024
    ) -> np.ndarray:
        """Values (S, H) that the masked decoder predicts for genes that a slide does not show.

        Args:
            slide: prepared with ``hidden=genes``, or of a panel without them.
            genes: (H,) names of the vocabulary.
            tile_spots: core spots of a tile.

        Returns:
            TF-IDF values relative to the mean of the spot's keyword genes. Trained for it with
            ``objective.query_genes`` above 0.

        Raises:
            ConfigError: a gene outside the vocabulary, or an encoder without a masked view.
        """
        position = {name: column for column, name in enumerate(self.artifacts.genes)}
        unknown = [name for name in genes if name not in position]
        if unknown:
            raise ConfigError(
                f"{len(unknown)} genes are not in the model's vocabulary ({', '.join(unknown[:3])}"
                "); fold them in first, or ask for others"
            )
        column_H = torch.tensor([position[name] for name in genes], dtype=torch.long)
        tiles = []
        with self._evaluating():
            for _, batch in iter_tiles(slide, self.halo, tile_spots):
                parts = [self._imputed(batch, column) for column in column_H.split(QUERIES)]
                tiles.append(torch.cat(parts, dim=1)[batch.core_S.to(self.device)])
        return _numpy(torch.cat(tiles))

    def _imputed(self, batch: SlideBatch, column_Q: Tensor) -> Tensor:
        """Predicted values (S, Q) of some genes for every spot of a batch."""
        gene_SQ = column_Q.expand(batch.n_spots, -1)
        value_SQ = torch.zeros(gene_SQ.shape)
        asked = dataclasses.replace(batch, query_gene_SQ=gene_SQ, query_value_SQ=value_SQ)
        asked = with_queries(asked).to(self.device)
        hidden_SK = torch.zeros(asked.gene_SK.shape, dtype=torch.bool, device=self.device)
        hidden_SK[:, -len(column_Q) :] = True
        nobody_S = torch.zeros(asked.n_spots, dtype=torch.bool, device=self.device)
        view = self.masked_view(asked, OmicsMask(hidden_SK, nobody_S))
        return view.value_SK[:, -len(column_Q) :]

    def encode_gene_sets(self, sets: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Unit embeddings (M, D) of gene sets, also ones never seen in training.

        Args:
            sets: name -> gene names of the vocabulary's id type.

        Raises:
            ConfigError: a set shares no gene with the vocabulary.
        """
        matrix = sets_matrix(sets, self.artifacts)
        k = self.artifacts.settings["genes"]["keyword_genes"]
        gene, value, vector = self.artifacts.set_inputs(matrix, k)
        batch = set_batch(gene, value, vector, self.artifacts.groups).to(self.device)
        with self._evaluating():
            embedding = F.normalize(self.project_omics(batch), dim=1)
        return _numpy(embedding)

    def encode_omics(self, adata: Any, spatial: str = "spatial") -> np.ndarray:
        """Unit omics embeddings (S, D) of one slide given as AnnData.

        Args:
            adata: raw counts in ``X``, gene names in ``var_names``, centres in micrometres in
                ``obsm[spatial]``.
            spatial: the key in ``obsm``.
        """
        from hibio.data.anndata import slide_of_anndata

        embedding = self.encode_slide(slide_of_anndata(adata, self.artifacts, spatial)).omics
        assert embedding is not None
        return embedding

    def encode_image(self, image: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """Unit image embeddings (S, D) of the spots of ONE slide.

        Args:
            image: stored features (S, F) for a features tower, or uint8 patches (S, h, w, 3) for
                a timm tower. Both are standardised over the rows given, as in training, and
                patches are brought to the one stain that a model with one was trained on.
            context: the wider patches of the same spots, for a model that reads them.
        """
        from hibio.data.anndata import image_batch

        batch = image_batch(image, self.artifacts, context, self.stain).to(self.device)
        with self._evaluating():
            embedding = F.normalize(self.project_image(batch), dim=1)
        return _numpy(embedding)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
