"""From a batch to a LossOutput: which parts of the model a stage's terms need, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hibio import keys
from hibio.batch import LevelEmbeddings, LevelPair, LossOutput, SlideBatch
from hibio.config import ConfigError
from hibio.data.views import Views
from hibio.encoders.mlp import neighbour_mean
from hibio.encoders.omics import OmicsMask, relative_values
from hibio.losses.contrastive import info_nce, near_duplicates
from hibio.losses.decorrelation import decorrelation
from hibio.losses.expression import expression_mse
from hibio.losses.masked import masked_mse, profile_mse
from hibio.losses.multilevel import combine
from hibio.losses.pathway import pathway_kl
from hibio.losses.region import region_info_nce, spot_to_region
from hibio.losses.spatial import spatial_contrast
from hibio.model import HiBio
from hibio.omics_views import (
    dropped_view,
    mean_value,
    padded_factors,
    thinned_view,
    with_queries,
)
from hibio.training.stages import StageConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of the loss terms.

    Attributes:
        negatives: same_slide | all | mixed (METHOD section 5, slide shortcut).
        duplicate_um: pairs of one slide closer than this ...
        duplicate_correlation: ... whose spot vectors correlate above this are no negatives.
        mask_genes: share of keyword genes hidden in the masked view.
        mask_spots: share of whole spots hidden.
        query_genes: genes outside its keywords that the masked view of a spot is asked about
            (most are 0), so that the decoder learns absence too; imputation needs it.
        contrast_um: radius of the spatial contrast (METHOD 3.1) ...
        contrast_correlation: ... within which spots whose spot vectors correlate above this are
            positives.
        drop_genes: share of keyword genes that each view of the spatial contrast lacks.
        keep_counts: share of its counts that the second view keeps.
        anchors_per_step: pathways encoded anew in a step; the others come from the cache.
    """

    negatives: Literal["same_slide", "all", "mixed"] = "same_slide"
    duplicate_um: float = 150.0
    duplicate_correlation: float = 0.95
    mask_genes: float = 0.2
    mask_spots: float = 0.15
    query_genes: int = 0
    contrast_um: float = 150.0
    contrast_correlation: float = 0.5
    drop_genes: float = 0.2
    keep_counts: float = 0.7
    anchors_per_step: int = 32

    def __post_init__(self) -> None:
        for name in ("mask_genes", "mask_spots", "drop_genes", "keep_counts"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        if self.query_genes < 0:
            raise ValueError(f"query_genes is {self.query_genes}, 0 or more is needed")


class Objective:
    """Computes the weighted terms of a stage.

    Args:
        model: the model in training.
        config: see :class:`ObjectiveConfig`.
        levels: names of the region levels of a batch.
    """

    def __init__(self, model: HiBio, config: ObjectiveConfig, levels: Sequence[str]) -> None:
        self.model = model
        self.config = config
        self.levels = tuple(levels)
        self._factors = padded_factors(model.artifacts).to(model.device)

    def check(self, stages: Sequence[StageConfig]) -> None:
        """Refuse stages before the first step, not when they are reached.

        Raises:
            ConfigError: a stage has terms that this model cannot compute.
        """
        for stage in stages:
            if stage.needs_image and self.model.vision is None:
                raise ConfigError(
                    f"stage {stage.name!r} has terms that read images ("
                    f"{', '.join(sorted(keys.IMAGE_TERMS & stage.active.keys()))}), and this model "
                    "has no vision tower: set data.image and train on slides with images, or take "
                    "these terms out"
                )
            if stage.needs_mask and not hasattr(self.model.omics, "encode"):
                raise ConfigError(
                    f"stage {stage.name!r} has terms of the masked view ("
                    f"{', '.join(sorted(keys.MASKED_TERMS & stage.active.keys()))}), which the "
                    f"omics encoder {self.model.config.omics.name!r} does not have: set "
                    "model.omics.name: graph_hierarchy, or take these terms out"
                )

    def views(self, stage: StageConfig, rng: np.random.Generator) -> Views | None:
        """What the stage's terms compare the spots of a batch with; None for nothing."""
        keep = self.config.keep_counts if stage.needs_thinned else None
        queries = self.config.query_genes if keys.TERM_MASKED in stage.active else 0
        return Views(rng, keep, queries) if keep is not None or queries else None

    def __call__(self, batch: SlideBatch, stage: StageConfig) -> LossOutput:
        """The stage's terms on one batch; random draws come from torch's global generator."""
        terms: dict[str, Tensor] = {}
        active = stage.active
        if stage.needs_embeddings:
            levels = self.levels if stage.needs_regions else ()
            pairs = self.model(batch, levels)
            terms |= self._spot_terms(batch, pairs, active)
            terms |= self._region_terms(batch, pairs, active)
        if stage.needs_mask:
            terms |= self._masked_terms(batch)
        if stage.needs_thinned:
            terms[keys.TERM_SPATIAL] = self._spatial_term(batch)
        used = {name: value for name, value in terms.items() if name in active}
        return combine(used, active, n=int(batch.core_S.sum()))

    def _spot_terms(
        self, batch: SlideBatch, pairs: LevelEmbeddings, active: dict[str, float]
    ) -> dict[str, Tensor]:
        image_SD, omics_SD = pairs[keys.SPOT].image, pairs[keys.SPOT].omics
        core = batch.core_S
        terms: dict[str, Tensor] = {}
        if keys.TERM_SPOT in active and image_SD is not None:
            terms[keys.TERM_SPOT] = info_nce(
                image_SD,
                omics_SD,
                self.model.temperature,
                exclude_NN=self._duplicates(batch),
                group_N=pairs[keys.SPOT].group,
                negatives=self.config.negatives,
            )
        if keys.TERM_EXPRESSION in active and image_SD is not None:
            assert batch.expression_SH is not None
            predicted = self.model.expression(image_SD)
            terms[keys.TERM_EXPRESSION] = expression_mse(predicted, batch.expression_SH[core])
        if keys.TERM_PATHWAY in active:
            terms[keys.TERM_PATHWAY] = self._pathway_term(batch, image_SD, omics_SD)
        if keys.TERM_DECORRELATION in active:
            terms[keys.TERM_DECORRELATION] = decorrelation(omics_SD * omics_SD.shape[1] ** 0.5)
        return terms

    def _duplicates(self, batch: SlideBatch) -> Tensor | None:
        if self.config.duplicate_um <= 0:
            return None
        core = batch.core_S
        return near_duplicates(
            batch.vector_SV[core],
            batch.xy_um_S2[core],
            batch.slide_of_spot_S[core],
            self.config.duplicate_um,
            self.config.duplicate_correlation,
        )

    def _pathway_term(self, batch: SlideBatch, image_SD: Tensor | None, omics_SD: Tensor) -> Tensor:
        assert batch.target_SM is not None
        target_SM = batch.target_SM[batch.core_S]
        anchor_MD = self.model.anchor_embeddings(self._fresh_anchors(target_SM))
        temperature = self.model.anchor_temperature
        term = pathway_kl(omics_SD, anchor_MD, target_SM, temperature)
        if image_SD is None:
            return term
        return (term + pathway_kl(image_SD, anchor_MD, target_SM, temperature)) / 2

    def _fresh_anchors(self, target_SM: Tensor) -> Tensor | None:
        """Pathways to encode in this step: half the most wanted ones, the rest drawn at random."""
        n_sets, wanted = target_SM.shape[1], self.config.anchors_per_step
        if n_sets <= wanted:
            return None
        order = target_SM.sum(dim=0).argsort(descending=True)
        named, others = order[: wanted // 2], order[wanted // 2 :]
        draw = torch.randperm(len(others), device=others.device)[: wanted - len(named)]
        return torch.cat([named, others[draw]])

    def _region_terms(
        self, batch: SlideBatch, pairs: LevelEmbeddings, active: dict[str, float]
    ) -> dict[str, Tensor]:
        levels = [name for name in self.levels if name in pairs]
        terms: dict[str, Tensor] = {}
        if not levels or pairs[keys.SPOT].image is None:
            return terms
        if keys.TERM_REGION in active:
            between = [self._between_towers(pairs[name]) for name in levels]
            terms[keys.TERM_REGION] = torch.stack(between).mean()
        if keys.TERM_MEMBER in active:
            region_LS = batch.region_of_spot_LS[:, batch.core_S]
            member = [
                self._to_own_region(pairs[keys.SPOT], pairs[name], region_S)
                for name, region_S in zip(levels, region_LS, strict=True)
            ]
            terms[keys.TERM_MEMBER] = torch.stack(member).mean()
        return terms

    def _between_towers(self, region: LevelPair) -> Tensor:
        assert region.image is not None
        return region_info_nce(
            region.image,
            region.omics,
            self.model.temperature,
            region.group,
            self.config.negatives,
        )

    def _to_own_region(self, spot: LevelPair, region: LevelPair, region_S: Tensor) -> Tensor:
        """Spots of one tower against regions of the other, the mean of both ways."""
        assert spot.image is not None
        assert region.image is not None
        row_S = torch.unique(region_S, return_inverse=True)[1]
        temperature = self.model.temperature
        one = spot_to_region(spot.image, region.omics, row_S, temperature)
        return (one + spot_to_region(spot.omics, region.image, row_S, temperature)) / 2

    def _masked_terms(self, batch: SlideBatch) -> dict[str, Tensor]:
        n_genes = self.model.artifacts.n_genes
        present_SK = batch.gene_SK < n_genes
        mask = draw_mask(present_SK, self.config.mask_genes, self.config.mask_spots)
        target_SK = relative_values(batch.value_SK, present_SK)
        if batch.query_gene_SQ is not None:
            assert batch.query_value_SQ is not None
            asked_SQ = batch.query_gene_SQ < n_genes
            scale_S1 = mean_value(batch.value_SK, present_SK)
            target_SK = torch.cat([target_SK, batch.query_value_SQ / scale_S1], dim=1)
            mask = OmicsMask(torch.cat([mask.gene_SK, asked_SQ], dim=1), mask.spot_S)
            batch = with_queries(batch)
        view = self.model.masked_view(batch, mask)
        core = batch.core_S
        hidden_SK = mask.gene_SK & core[:, None]
        around_SV = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
        return {
            keys.TERM_MASKED: masked_mse(view.value_SK, target_SK, hidden_SK),
            keys.TERM_PROFILE: profile_mse(view.own_SV, batch.vector_SV, core),
            keys.TERM_NEIGHBOUR: profile_mse(view.around_SV, around_SV, core),
        }

    def _spatial_term(self, batch: SlideBatch) -> Tensor:
        """Contrast of two views, each without a share of its genes, the second also thinned."""
        n_genes = self.model.artifacts.n_genes
        core = batch.core_S
        embedded = [
            self.model.project_omics(dropped_view(view, self._factors, n_genes, share))[core]
            for view, share in (
                (batch, self.config.drop_genes),
                (thinned_view(batch), self.config.drop_genes),
            )
        ]
        first_SD, second_SD = (F.normalize(rows, dim=1) for rows in embedded)
        return spatial_contrast(
            first_SD,
            second_SD,
            batch.xy_um_S2[core],
            batch.slide_of_spot_S[core],
            batch.vector_SV[core],
            self.model.temperature,
            radius_um=self.config.contrast_um,
            correlation=self.config.contrast_correlation,
        )


def draw_mask(present_SK: Tensor, genes: float, spots: float) -> OmicsMask:
    """Hide a share of the keyword genes, and all genes of a share of the spots."""
    spot_S = torch.rand(len(present_SK), device=present_SK.device) < spots
    gene_SK = torch.rand(present_SK.shape, device=present_SK.device) < genes
    return OmicsMask((gene_SK | spot_S[:, None]) & present_SK, spot_S)
