"""From micro-batches to the loss of a step: what a stage's terms need of the model, and no more.

``outputs`` runs the model on one micro-batch, ``terms`` computes the loss from the rows of all
micro-batches of a step, wherever they were computed: everything that compares spots, or divides by
their number, stands there. ``forward`` does both, so that all use of parameters is inside one
module: DeepSpeed's ZeRO-3 takes the parameters away between forward passes.

Legend: S core spots, K keyword genes, Q query genes, V spot-vector length, R regions, M pathways,
D shared width, N pairs of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hibio import keys
from hibio.batch import LevelPair, LossOutput, SlideBatch
from hibio.config.files import ConfigError
from hibio.config.training import ObjectiveConfig, StageConfig
from hibio.data.collate import Views, dropped_view, padded_factors, thinned_view, with_queries
from hibio.encoders.base import niche_mean
from hibio.encoders.genes import OmicsMask, mean_value, relative_values
from hibio.losses.contrastive import NearDuplicates, info_nce, soft_info_nce, spot_to_region
from hibio.losses.masked import decorrelation, masked_mse, rows_mse
from hibio.losses.multilevel import combine
from hibio.losses.pathway import pathway_kl
from hibio.losses.spatial import spatial_contrast
from hibio.model import HiBio
from hibio.training.step_outputs import MICRO_OF_SPOT, SUM, MicroBatch, Rows, gather, join

Weights = Mapping[str, float]

PREFIX = "model."  # of the model's parameters in this module
TOTAL, N_SPOTS, TEMPERATURE = "total", "n_spots", "temperature"


def draw_mask(present_SK: Tensor, genes: float, spots: float) -> OmicsMask:
    """Hide a share of the keyword genes, and all genes of a share of the spots."""
    spot_S = torch.rand(len(present_SK), device=present_SK.device) < spots
    gene_SK = torch.rand(present_SK.shape, device=present_SK.device) < genes
    return OmicsMask((gene_SK | spot_S[:, None]) & present_SK, spot_S)


class Objective(nn.Module):
    """The model in training under the weighted terms of a stage.

    ``levels`` names the region levels of a batch.
    """

    def __init__(self, model: HiBio, config: ObjectiveConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.levels = tuple(levels)
        self.precision: Callable[[], AbstractContextManager[object]] = nullcontext
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

    def lr_scale(self, name: str) -> float:
        """Learning rate of a parameter of this module over that of the stage."""
        of_backbone = name.startswith(f"{PREFIX}vision.backbone.")
        return self.model.config.vision.lr_scale if of_backbone else 1.0

    def views(self, stage: StageConfig, rng: np.random.Generator) -> Views | None:
        """What the stage's terms compare the spots of a batch with; None for nothing."""
        keep = self.config.keep_counts if stage.needs_thinned else None
        queries = self.config.query_genes if keys.TERM_MASKED in stage.active else 0
        return Views(rng, keep, queries) if keep is not None or queries else None

    def forward(
        self,
        stage: StageConfig,
        micro: MicroBatch | None,
        others: Sequence[Rows] = (),
        seed: int | None = None,
        *,
        weigh: bool = False,
    ) -> dict[str, Tensor]:
        """Rows of a micro-batch or, with a seed, the loss of the step, in the engine's precision.

        Args:
            stage: whose terms are trained.
            micro: what the model runs on; the draws made for it depend on nothing else.
            others: rows of other micro-batches of this process, for the loss.
            seed: of the draws made for the whole step, the same on all processes.
            weigh: the terms keep their graph, for `gradient_shares`.

        Returns:
            The rows; or every term, ``TOTAL``, ``N_SPOTS`` and ``TEMPERATURE``. Tensors in a plain
            dict, which is what DeepSpeed's hooks look into.
        """
        with self.precision():
            parts = list(others)
            if micro is not None:
                torch.manual_seed(micro.seed)
                parts.append(self.outputs(micro, stage))
            if seed is None:
                return parts[-1]
            rows = gather(join(parts))
            torch.manual_seed(seed)
            found = self._found(rows, stage)
            loss = combine(found, stage.active, n=len(rows[MICRO_OF_SPOT]))
            facts = {N_SPOTS: loss.total.new_tensor(loss.n), TEMPERATURE: self.model.temperature}
            return {**(found if weigh else loss.terms), **facts, TOTAL: loss.total}

    def outputs(self, micro: MicroBatch, stage: StageConfig) -> Rows:
        """Everything that the stage's terms read of one micro-batch.

        The names depend on the stage alone: a batch without images has zeros for embeddings, and
        ``has_image`` says so.
        """
        batch = micro.batch
        rows = micro.identity_rows()
        if stage.needs_embeddings:
            rows |= self._embeddings(batch, stage)
        if stage.needs_mask:
            rows |= self._masked_sums(batch)
        if stage.needs_thinned:
            rows |= self._two_views(batch)
        duplicates = keys.TERM_SPOT in stage.active and self.config.duplicate_um > 0
        if stage.needs_thinned or duplicates:
            rows["vector"] = batch.vector_SV[batch.core_S]
            rows["xy_um"] = batch.xy_um_S2[batch.core_S]
        return rows

    def _embeddings(self, batch: SlideBatch, stage: StageConfig) -> Rows:
        """Unit embeddings of the core spots, and the targets that they are compared with."""
        core, active = batch.core_S, stage.active
        wants_image = self.model.vision is not None and (
            stage.needs_image or keys.TERM_PATHWAY in active
        )
        spot = self.model(batch, image=wants_image)
        rows = {"omics": spot.omics}
        if keys.TERM_PATHWAY in active:
            assert batch.target_SM is not None
            rows["target"] = batch.target_SM[core]
        if not wants_image:
            return rows
        seen = spot.image is not None
        rows["image"] = torch.zeros_like(spot.omics) if spot.image is None else spot.image
        rows["has_image"] = torch.full_like(core[core], seen)
        if keys.TERM_EXPRESSION in active:
            assert batch.expression_SH is not None
            target_SH = batch.expression_SH[core] if seen else batch.expression_SH[:0]
            predicted_SH = self.model.expression(rows["image"][: len(target_SH)])
            mean = rows_mse(predicted_SH, target_SH)
            rows[SUM + keys.TERM_EXPRESSION] = _sum_row(mean, target_SH.numel())
        return rows

    def _masked_sums(self, batch: SlideBatch) -> Rows:
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
        target_SK = self.model.standardised(target_SK, batch.gene_SK)
        view = self.model.masked_view(batch, mask)
        core = batch.core_S
        hidden_SK = mask.gene_SK & core[:, None]
        assert batch.frequency_SH is not None
        niche_SH = niche_mean(batch.frequency_SH, batch.neighbour_SN)
        n_vectors, n_niches = (core.sum() * one.shape[1] for one in (view.own_SV, niche_SH))
        means = {
            keys.TERM_MASKED: (masked_mse(view.value_SK, target_SK, hidden_SK), hidden_SK.sum()),
            keys.TERM_PROFILE: (rows_mse(view.own_SV, batch.vector_SV, core), n_vectors),
            keys.TERM_NEIGHBOUR: (rows_mse(view.niche_SH, niche_SH, core), n_niches),
        }
        return {SUM + term: _sum_row(mean, count) for term, (mean, count) in means.items()}

    def _two_views(self, batch: SlideBatch) -> Rows:
        """Two views, each without a share of its genes, the second also thinned."""
        n_genes, share = self.model.artifacts.n_genes, self.config.drop_genes
        first_SD, second_SD = (
            self.model.project_omics(dropped_view(view, self._factors, n_genes, share))
            for view in (batch, thinned_view(batch))
        )
        core = batch.core_S
        return {
            "view_a": F.normalize(first_SD[core], dim=1),
            "view_b": F.normalize(second_SD[core], dim=1),
        }

    def terms(self, rows: Rows, stage: StageConfig) -> LossOutput:
        """The stage's terms on the rows of all micro-batches of a step.

        Reductions are over all rows, negatives come from all rows, and a slide or a region in
        several micro-batches is one.
        """
        return combine(self._found(rows, stage), stage.active, n=len(rows[MICRO_OF_SPOT]))

    def _found(self, rows: Rows, stage: StageConfig) -> dict[str, Tensor]:
        """Every term of the stage, not weighted, with its graph."""
        active, found = stage.active, dict[str, Tensor]()
        for names, compute in STEP_TERMS.items():
            if active.keys() & set(names):
                found |= compute(self, rows, active)
        for name in rows:
            term = name.removeprefix(SUM)
            if term != name and term in active:
                found[term] = rows[name][:, 0].sum() / rows[name][:, 1].sum().clamp(min=1.0)
        return found

    def _pathway_term(self, rows: Rows, active: Weights) -> dict[str, Tensor]:
        anchor_MD = self.model.anchor_embeddings(self._fresh_anchors(rows["target"]))
        temperature = self.model.anchor_temperature
        term = pathway_kl(rows["omics"], anchor_MD, rows["target"], temperature)
        if "image" in rows and bool(rows["has_image"].any()):
            paired = _with_image(rows)
            other = pathway_kl(paired["image"], anchor_MD, paired["target"], temperature)
            term = (term + other) / 2
        return {keys.TERM_PATHWAY: term}

    def _fresh_anchors(self, target_SM: Tensor) -> Tensor | None:
        """Pathways to encode in this step: half the most wanted ones, the rest drawn at random."""
        n_sets, wanted = target_SM.shape[1], self.config.anchors_per_step
        if n_sets <= wanted:
            return None
        order = target_SM.sum(dim=0).argsort(descending=True)
        named, others = order[: wanted // 2], order[wanted // 2 :]
        draw = torch.randperm(len(others), device=others.device)[: wanted - len(named)]
        return torch.cat([named, others[draw]])

    def _decorrelation_term(self, rows: Rows, active: Weights) -> dict[str, Tensor]:
        scale = rows["omics"].shape[1] ** 0.5
        return {keys.TERM_DECORRELATION: decorrelation(rows["omics"] * scale)}

    def _spot_term(self, rows: Rows, active: Weights) -> dict[str, Tensor]:
        """Patch against profile over all rows of a step."""
        paired, config, temperature = _with_image(rows), self.config, self.model.temperature
        image_ND, omics_ND, slide_N = paired["image"], paired["omics"], paired["slide"]
        if config.targets == "soft":
            groups: list[Tensor | None] = [None] if config.negatives in ("all", "mixed") else []
            groups += [slide_N] if config.negatives in ("same_slide", "mixed") else []
            losses = [
                soft_info_nce(image_ND, omics_ND, temperature, config.target_temperature, group_N)
                for group_N in groups
            ]
            return {keys.TERM_SPOT: torch.stack(losses).mean()}
        exclude = None
        if config.duplicate_um > 0:
            exclude = NearDuplicates(
                paired["vector"],
                paired["xy_um"],
                slide_N,
                config.duplicate_um,
                config.duplicate_correlation,
            )
        term = info_nce(image_ND, omics_ND, temperature, exclude, slide_N, config.negatives)
        return {keys.TERM_SPOT: term}

    def _region_terms(self, rows: Rows, active: Weights) -> dict[str, Tensor]:
        """Image region against omics region, and spots against regions, the mean over levels."""
        paired, temperature = _with_image(rows), self.model.temperature
        image_ND, omics_ND = paired["image"], paired["omics"]
        spot = LevelPair(image_ND, omics_ND, paired["slide"])
        between, member = [], []
        for region_N in paired["region"].T[: len(self.levels)]:
            region, index_N = self.model.regions(spot, region_N)
            assert region.image is not None
            if keys.TERM_REGION in active:
                pair = (region.image, region.omics)
                between.append(
                    info_nce(*pair, temperature, None, region.group, self.config.negatives)
                )
            if keys.TERM_MEMBER in active:
                one = spot_to_region(image_ND, region.omics, index_N, temperature)
                other = spot_to_region(omics_ND, region.image, index_N, temperature)
                member.append((one + other) / 2)
        parts = {keys.TERM_REGION: between, keys.TERM_MEMBER: member}
        return {term: torch.stack(values).mean() for term, values in parts.items() if values}

    def _spatial_term(self, rows: Rows, active: Weights) -> dict[str, Tensor]:
        term = spatial_contrast(
            rows["view_a"],
            rows["view_b"],
            rows["xy_um"],
            rows["slide"],
            rows["vector"],
            self.model.temperature,
            radius_um=self.config.contrast_um,
            correlation=self.config.contrast_correlation,
        )
        return {keys.TERM_SPATIAL: term}


#: Names -> what computes them from the rows of the whole step, in the order of their sum. A term
#: that is a plain mean over spots needs no entry: ``outputs`` gives its ``sum/<term>``.
STEP_TERMS: dict[tuple[str, ...], Callable[[Objective, Rows, Weights], dict[str, Tensor]]] = {
    (keys.TERM_PATHWAY,): Objective._pathway_term,
    (keys.TERM_DECORRELATION,): Objective._decorrelation_term,
    (keys.TERM_SPOT,): Objective._spot_term,
    (keys.TERM_REGION, keys.TERM_MEMBER): Objective._region_terms,
    (keys.TERM_SPATIAL,): Objective._spatial_term,
}


def gradient_shares(
    terms: Mapping[str, Tensor], weights: Weights, parameters: Sequence[nn.Parameter]
) -> dict[str, float]:
    """Norm of each weighted term's gradient over the sum of all norms.

    On the parameters that more than one term reaches: what only one term trains says nothing about
    their balance. On all parameters where no two terms meet.

    Args:
        terms: name -> scalar with its graph, which stays.
        weights: name -> weight of these terms.
        parameters: that are trained.
    """
    squares = []  # (parameters,) of each term; NaN where it does not reach
    for name, weight in weights.items():
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if terms[name].requires_grad:
            found = torch.autograd.grad(
                weight * terms[name], parameters, retain_graph=True, allow_unused=True
            )
        squares.append([math.nan if one is None else float(one.square().sum()) for one in found])
    square = np.array(squares)
    shared = np.isfinite(square).sum(axis=0) > 1
    square = square[:, shared] if shared.any() else square
    norm = np.sqrt(np.nansum(square, axis=1))
    return dict(zip(weights, (norm / max(float(norm.sum()), 1e-30)).tolist(), strict=True))


def _with_image(rows: Rows) -> Rows:
    """Rows of the spots that have an image."""
    seen_S = rows["has_image"]
    if bool(seen_S.all()):
        return rows
    return {name: value[seen_S] for name, value in rows.items() if len(value) == len(seen_S)}


def _sum_row(mean: Tensor, count: Tensor | int) -> Tensor:
    """(1, 2): the sum behind a mean, and its count."""
    number = torch.as_tensor(count, dtype=mean.dtype, device=mean.device)
    return torch.stack([mean * number, number])[None]
