"""HiBio: two towers, their projections into one space, pooling into regions; no loss inside.

Legend: S spots, K keyword genes, V gene factors, R regions, M pathways, D shared width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hibio.artifacts import Artifacts, read_artifacts
from hibio.batch import LevelEmbeddings, LevelPair, MaskedView, SlideBatch
from hibio.config import ConfigError, load_section
from hibio.data.slide import PreparedSlide
from hibio.data.tiles import iter_tiles
from hibio.encoders.anchors import AnchorTable, set_batch, sets_matrix
from hibio.encoders.base import OmicsContext
from hibio.encoders.mlp import mlp
from hibio.encoders.omics import OmicsConfig, OmicsMask, build_omics_encoder
from hibio.encoders.pooling import AttentionPool
from hibio.encoders.vision import VisionConfig, build_vision_encoder
from hibio.keys import SPOT

MAX_SCALE = 100.0  # cap of 1 / temperature


@dataclass(frozen=True)
class ModelConfig:
    """Both towers and the shared space.

    Attributes:
        vision: see :class:`VisionConfig`; ``name: none`` for counts alone.
        omics: see :class:`OmicsConfig`.
        embed_dim: D.
        dropout: of the projections.
        temperature: first value of the learned contrast temperature.
        anchor_temperature: first value of the learned anchor temperature.
        anchor: omics (a pathway goes through the omics branch) | table (learned, the baseline).
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    omics: OmicsConfig = field(default_factory=OmicsConfig)
    embed_dim: int = 128
    dropout: float = 0.1
    temperature: float = 0.1
    anchor_temperature: float = 0.1
    anchor: Literal["omics", "table"] = "omics"


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


class HiBio(nn.Module):
    """The model of METHOD sections 3-5.

    Args:
        config: sizes and switches.
        artifacts: what was fitted on the training slides.
    """

    omics: Any  # towers are user-replaceable: see encoders.base.SpotEncoder
    vision: Any

    def __init__(self, config: ModelConfig, artifacts: Artifacts) -> None:
        super().__init__()
        self.config = config
        self.artifacts = artifacts
        width = config.embed_dim
        n_factors = artifacts.factors.components.shape[1]
        self.omics = build_omics_encoder(config.omics, OmicsContext.of(artifacts))
        self.omics_head = mlp(self.omics.embed_dim, 2 * width, width, config.dropout)
        self.vision = None
        if config.vision.name != "none":
            self.vision = build_vision_encoder(config.vision)
            self.image_head = mlp(self.vision.embed_dim, 2 * width, width, config.dropout)
            self.expression_head = nn.Linear(width, len(artifacts.target_genes))
        self.pool = AttentionPool(width)
        if hasattr(self.omics, "encode"):
            self.decoder = mlp(2 * self.omics.embed_dim, self.omics.embed_dim, 1, 0.0)
        self.own_head = nn.Linear(width, n_factors)
        self.around_head = nn.Linear(width, n_factors)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.log_scale_anchor = nn.Parameter(torch.tensor(-math.log(config.anchor_temperature)))
        self.anchors = AnchorTable(artifacts, width, learned=config.anchor == "table")

    # ------------------------------------------------------------------ training
    @property
    def temperature(self) -> Tensor:
        """Learned temperature of the contrast, at least 0.01."""
        return 1.0 / self.log_scale.exp().clamp(max=MAX_SCALE)

    @property
    def anchor_temperature(self) -> Tensor:
        """Learned temperature of the pathway softmax, at least 0.01."""
        return 1.0 / self.log_scale_anchor.exp().clamp(max=MAX_SCALE)

    def project_omics(self, batch: SlideBatch) -> Tensor:
        """Omics embedding before normalisation, (S, D)."""
        return self.omics_head(self.omics(batch))

    def project_image(self, batch: SlideBatch) -> Tensor:
        """Image embedding before normalisation, (S, D)."""
        if self.vision is None:
            raise ConfigError("this model has no vision tower (model.vision.name is none)")
        return self.image_head(self.vision(batch))

    def forward(self, batch: SlideBatch, levels: Sequence[str] = ()) -> LevelEmbeddings:
        """Embeddings of the core spots, and of the regions of each level.

        Args:
            batch: core spots and halo.
            levels: names of the region levels, one for each row of ``region_of_spot_LS``; none
                for spots only.
        """
        core = batch.core_S
        omics_SD = F.normalize(self.project_omics(batch)[core], dim=1)
        image_SD = None
        if self.vision is not None and batch.has_image:
            image_SD = F.normalize(self.project_image(batch)[core], dim=1)
        group_S = batch.slide_of_spot_S[core]
        pairs = {SPOT: LevelPair(image_SD, omics_SD, group_S)}
        for name, region_S in zip(levels, batch.region_of_spot_LS[:, core], strict=False):
            pairs[name] = self._region_pair(image_SD, omics_SD, region_S, group_S)
        return pairs

    def _region_pair(
        self, image_SD: Tensor | None, omics_SD: Tensor, region_S: Tensor, group_S: Tensor
    ) -> LevelPair:
        ids, index_S = torch.unique(region_S, return_inverse=True)
        n_regions = len(ids)
        group_R = group_S.new_zeros(n_regions).scatter_(0, index_S, group_S)
        image = None if image_SD is None else self.pooled(image_SD, index_S, n_regions)
        return LevelPair(image, self.pooled(omics_SD, index_S, n_regions), group_R)

    def pooled(self, spot_SD: Tensor, region_S: Tensor, n_regions: int) -> Tensor:
        """Unit region embeddings (R, D) from unit spot embeddings; the same for both towers."""
        return F.normalize(self.pool(spot_SD, region_S, n_regions), dim=1)

    def masked_view(self, batch: SlideBatch, mask: OmicsMask) -> MaskedView:
        """Predictions from the masked omics view (METHOD section 3.1)."""
        if not hasattr(self.omics, "encode"):
            raise ConfigError(
                f"encoder {self.config.omics.name!r} has no masked view; leave the omics/ terms out"
            )
        spot_SD, gene_SKD = self.omics.encode(batch, mask)
        joint = torch.cat([gene_SKD, spot_SD[:, None, :].expand_as(gene_SKD)], dim=2)
        embedding_SD = self.omics_head(spot_SD)
        return MaskedView(
            self.decoder(joint).squeeze(2),
            self.own_head(embedding_SD),
            self.around_head(embedding_SD),
        )

    def expression(self, image_SD: Tensor) -> Tensor:
        """Target genes from the normalised image embedding, (S, H) standardised per slide."""
        return self.expression_head(image_SD * math.sqrt(image_SD.shape[1]))

    def anchor_embeddings(self, fresh_m: Tensor | None = None) -> Tensor:
        """Unit anchor embeddings (M, D).

        Args:
            fresh_m: pathways to encode anew, with gradient; the others come from the cache. All
                when None.
        """
        if self.anchors.table_MD is not None:
            return F.normalize(self.anchors.table_MD, dim=1)
        return self.anchors.embed(
            lambda sets: F.normalize(self.project_omics(sets), dim=1), fresh_m
        )

    # ------------------------------------------------------------------ inference
    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    @property
    def halo(self) -> int:
        """Hops of the spatial graph that an embedding depends on."""
        return int(getattr(self.omics, "hops", 1))

    @torch.inference_mode()
    def encode_slide(self, slide: PreparedSlide, tile_spots: int = 1024) -> SlideEmbedding:
        """Embed every spot; the result does not depend on ``tile_spots``."""
        was_training = self.training
        self.eval()
        image, omics, tower = [], [], []
        for _, batch in iter_tiles(slide, self.halo, tile_spots):
            batch = batch.to(self.device)
            if slide.has_counts:
                tower_SD = self.omics(batch)[batch.core_S]
                tower.append(tower_SD)
                omics.append(F.normalize(self.omics_head(tower_SD), dim=1))
            if self.vision is not None and batch.has_image:
                image.append(F.normalize(self.project_image(batch)[batch.core_S], dim=1))
        self.train(was_training)
        return SlideEmbedding(*(_numpy(torch.cat(x)) if x else None for x in (image, omics, tower)))

    @torch.inference_mode()
    def encode_gene_sets(self, sets: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Unit embeddings (M, D) of gene sets, also ones never seen in training.

        Args:
            sets: name -> gene names of the vocabulary's id type.

        Raises:
            ConfigError: a set shares no gene with the vocabulary.
        """
        matrix = sets_matrix(sets, self.artifacts)
        k = self.artifacts.settings["genes"]["keyword_genes"]
        batch = set_batch(*self.artifacts.set_inputs(matrix, k)).to(self.device)
        was_training = self.training
        self.eval()
        embedding = F.normalize(self.project_omics(batch), dim=1)
        self.train(was_training)
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

    @torch.inference_mode()
    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """Unit image embeddings (S, D) of the spots of ONE slide.

        Args:
            image: stored features (S, F) for a features tower, or uint8 patches (S, h, w, 3) for
                a timm tower. Both are standardised over the rows given, as in training.
        """
        from hibio.data.anndata import image_batch

        batch = image_batch(image, self.artifacts).to(self.device)
        was_training = self.training
        self.eval()
        embedding = F.normalize(self.project_image(batch), dim=1)
        self.train(was_training)
        return _numpy(embedding)

    @classmethod
    def from_checkpoint(cls, directory: Path | str) -> HiBio:
        """Load a checkpoint's three files; where a backbone's weights came from is not asked.

        Raises:
            ConfigError: a file is missing or does not fit the others.
        """
        directory = Path(directory)
        for name in ("config.yaml", "artifacts.h5", "model.safetensors"):
            if not (directory / name).is_file():
                raise ConfigError(
                    f"{directory}: no {name}, so this is not a HiBio checkpoint; give the folder "
                    "that `hibio train` printed (it ends in /checkpoint)"
                )
        config = load_section(ModelConfig, directory / "config.yaml", "model")
        vision = dataclasses.replace(config.vision, weights=None, pretrained=False)
        config = dataclasses.replace(config, vision=vision)
        model = cls(config, read_artifacts(directory / "artifacts.h5"))
        try:
            model.load_state_dict(load_file(directory / "model.safetensors"))
        except Exception as error:
            raise ConfigError(
                f"{directory / 'model.safetensors'}: does not fit config.yaml ({error}); the "
                "checkpoint is torn: use its .previous sibling or train again"
            ) from error
        return model.eval()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
