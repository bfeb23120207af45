"""Core spots of one or more slides, plus the halo that they need, as one SlideBatch.

Legend: S spots, K keyword genes, Q query genes, V spot-vector length, G vocabulary.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch
from hibio.data.slide import PreparedSlide
from preprocessing.stain import StainMethod, scaled_stains


@dataclass(frozen=True)
class Augment:
    """How the patches of a training step are changed (docs/method.md 4).

    The draw of a spot depends on the run's seed, the step, the slide and the spot alone, so it is
    the same after a resume and however a step is spread over batches and processes.

    Attributes:
        turns: one of the eight turns and flips of a square.
        stain: standard deviation of the logarithm by which the amounts of hematoxylin, of eosin
            and of the rest are multiplied; 0 leaves them.
        seed: of the run.
        step: of the run.
    """

    turns: bool
    stain: float
    seed: int
    step: int

    def __call__(
        self, slide_id: str, spots: np.ndarray, pictures: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Pictures of the same spots, uint8 (n, px, px, 3) each, changed alike."""
        slide = zlib.crc32(slide_id.encode())
        turn_n = np.zeros(len(spots), dtype=np.int64)
        factor_n3 = np.ones((len(spots), 3))
        for place, spot in enumerate(spots.tolist()):
            rng = np.random.default_rng([self.seed, self.step, slide, spot])
            turn_n[place] = rng.integers(8) if self.turns else 0
            factor_n3[place] = np.exp(self.stain * rng.standard_normal(3))
        return [self._changed(one, turn_n, factor_n3) for one in pictures]

    def _changed(
        self, patches: np.ndarray, turn_n: np.ndarray, factor_n3: np.ndarray
    ) -> np.ndarray:
        changed = scaled_stains(patches, factor_n3) if self.stain else patches.copy()
        for turn in np.unique(turn_n):
            alike = turn_n == turn
            turned = np.rot90(changed[alike], turn % 4, axes=(1, 2))
            changed[alike] = turned[:, :, ::-1] if turn >= 4 else turned
        return changed


@dataclass(frozen=True)
class Views:
    """What to compute beside the spots themselves, and how their patches are changed.

    Attributes:
        rng: of every draw.
        keep_counts: share of the counts that the thinned view keeps; None for no such view.
        query_genes: genes outside the keywords that a spot is asked about.
        augment: of patches; None leaves them.
    """

    rng: np.random.Generator
    keep_counts: float | None = None
    query_genes: int = 0
    augment: Augment | None = None


def view_arrays(slide: PreparedSlide, spots: np.ndarray, views: Views) -> dict[str, np.ndarray]:
    """Fields of :class:`hibio.SlideBatch` for the views asked for."""
    arrays: dict[str, np.ndarray] = {}
    if views.keep_counts is not None:
        gene, value, own, raw = slide.expression.thinned(spots, views.keep_counts, views.rng)
        vector = (raw - slide.vector_mean_V) * slide.vector_scale_V
        arrays["thinned_gene_SK"], arrays["thinned_value_SK"] = gene, value
        if own is not None:
            arrays["thinned_part_SK"] = own
        arrays["thinned_vector_SV"] = vector.astype(np.float32)
    if views.query_genes:
        gene, value, own = slide.expression.queries(spots, views.query_genes, views.rng)
        arrays["query_gene_SQ"], arrays["query_value_SQ"] = gene, value
        if own is not None:
            arrays["query_part_SQ"] = own
    return arrays


def padded_factors(artifacts: Artifacts) -> Tensor:
    """Gene factors with a row of zeros for the padding index, (G + 1, V) float32."""
    factors = torch.from_numpy(artifacts.factors.components).float()
    return torch.cat([factors, torch.zeros(1, factors.shape[1])])


def dropped_view(batch: SlideBatch, factors_GV: Tensor, n_genes: int, share: float) -> SlideBatch:
    """The batch as if a share of each spot's keyword genes had not been seen.

    Args:
        batch: the spots.
        factors_GV: (G + 1, V) of :func:`padded_factors`; the dropped genes leave the spot vector.
        n_genes: G, the padding index.
        share: chance of a gene to be dropped; draws come from torch's global generator.
    """
    drop_SK = torch.rand(batch.gene_SK.shape, device=batch.gene_SK.device) < share
    removed_SV = torch.einsum("sk,skv->sv", batch.parts_SK * drop_SK, factors_GV[batch.gene_SK])
    return dataclasses.replace(
        batch,
        gene_SK=batch.gene_SK.masked_fill(drop_SK, n_genes),
        value_SK=batch.value_SK.masked_fill(drop_SK, 0.0),
        part_SK=None if batch.part_SK is None else batch.part_SK.masked_fill(drop_SK, 0.0),
        vector_SV=batch.vector_SV - removed_SV * batch.vector_scale_SV,
    )


def thinned_view(batch: SlideBatch) -> SlideBatch:
    """The batch with the keyword genes and the spot vector of its thinned counts."""
    assert batch.thinned_gene_SK is not None
    assert batch.thinned_value_SK is not None
    assert batch.thinned_vector_SV is not None
    return dataclasses.replace(
        batch,
        gene_SK=batch.thinned_gene_SK,
        value_SK=batch.thinned_value_SK,
        part_SK=batch.thinned_part_SK,
        vector_SV=batch.thinned_vector_SV,
        thinned_gene_SK=None,
        thinned_value_SK=None,
        thinned_part_SK=None,
        thinned_vector_SV=None,
    )


def with_queries(batch: SlideBatch) -> SlideBatch:
    """The batch with its query genes behind its keyword genes, (S, K + Q)."""
    assert batch.query_gene_SQ is not None
    assert batch.query_value_SQ is not None
    part_SK = batch.part_SK
    if part_SK is not None:
        own_SQ = batch.query_value_SQ if batch.query_part_SQ is None else batch.query_part_SQ
        part_SK = torch.cat([part_SK, own_SQ], dim=1)
    return dataclasses.replace(
        batch,
        gene_SK=torch.cat([batch.gene_SK, batch.query_gene_SQ], dim=1),
        value_SK=torch.cat([batch.value_SK, batch.query_value_SQ], dim=1),
        part_SK=part_SK,
        query_gene_SQ=None,
        query_value_SQ=None,
        query_part_SQ=None,
    )


def with_halo(neighbour_SN: np.ndarray, core: np.ndarray, hops: int) -> np.ndarray:
    """``core``, then every spot within ``hops`` steps on the spatial graph (-1: all others)."""
    inside = np.zeros(len(neighbour_SN), dtype=bool)
    inside[core] = True
    if hops < 0:
        return np.concatenate([core, np.flatnonzero(~inside)])
    order, front = [core], core
    for _ in range(hops):
        reached = np.unique(neighbour_SN[front])
        front = reached[(reached >= 0) & ~inside[reached]]
        if len(front) == 0:
            break
        inside[front] = True
        order.append(front)
    return np.concatenate(order)


def slide_part(
    slide: PreparedSlide,
    regions_LS: np.ndarray,
    core: np.ndarray,
    hops: int,
    views: Views | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one slide's share of a batch, with indices local to that share."""
    spots = with_halo(slide.neighbour_SN, core, hops)
    local = np.full(slide.n_spots + 1, -1, dtype=np.int64)  # the last entry answers index -1
    local[spots] = np.arange(len(spots))
    neighbour = local[slide.neighbour_SN[spots]]
    distance = np.where(neighbour >= 0, slide.distance_um_SN[spots], np.inf)
    is_core = np.arange(len(spots)) < len(core)
    expression = slide.expression.rows(spots)
    part = {
        "gene_SK": expression.gene_SK,
        "value_SK": expression.value_SK,
        "vector_SV": slide.vector_SV[spots],
        "spot_group_S": slide.spot_group_S[spots],
        "vector_scale_SV": np.broadcast_to(
            slide.vector_scale_V, (len(spots), slide.vector_SV.shape[1])
        ),
        "neighbour_SN": neighbour,
        "distance_um_SN": distance.astype(np.float32),
        "xy_um_S2": slide.xy_um[spots],
        "core_S": is_core,
        "region_of_spot_LS": np.where(is_core, regions_LS[:, spots], -1),
        "target_SM": expression.target_SM,
        "expression_SH": expression.expression_SH,
        "frequency_SH": expression.frequency_SH,
    }
    if expression.part_SK is not None:
        part["part_SK"] = expression.part_SK
    if views is not None:
        part |= view_arrays(slide, spots, views)
    if slide.features_SF is not None:
        part["features_SF"] = slide.features_SF[spots]
    if slide.use_patches:
        pictures = [slide.patches(core)] + ([slide.context(core)] if slide.use_context else [])
        if views is not None and views.augment is not None:
            pictures = views.augment(slide.slide_id, core, pictures)
        for name, one in zip(("patches_SCHW", "context_SCHW"), pictures, strict=False):
            part[name] = _of_core(one, len(spots))
    if slide.stain_6 is not None:
        part["stain_S6"] = np.broadcast_to(slide.stain_6, (len(spots), 6))
    return part


def _of_core(patches_SHWC: np.ndarray, n_spots: int) -> np.ndarray:
    """Patches of the core spots (S, C, H, W), then zeros for the halo, which no tower looks at."""
    core_SCHW = np.moveaxis(patches_SHWC, 3, 1)
    whole = np.zeros((n_spots, *core_SCHW.shape[1:]), dtype=core_SCHW.dtype)
    whole[: len(core_SCHW)] = core_SCHW
    return whole


def collate(
    parts: Sequence[tuple[PreparedSlide, np.ndarray, np.ndarray]],
    hops: int = 1,
    views: Views | None = None,
) -> SlideBatch:
    """Join the parts of several slides; neighbour and region indices are offset.

    Args:
        parts: (slide, regions (L, S), core spots) of each slide.
        hops: halo depth; with as many as the omics branch has spatial layers plus one, the core
            embeddings equal whole-slide ones.
        views: what the training terms need beside the spots themselves.
    """
    arrays: list[dict[str, np.ndarray]] = []
    offset_spot, offset_region = 0, None
    for index, (slide, regions, core) in enumerate(parts):
        part = slide_part(slide, regions, core, hops, views)
        n_spots = len(part["core_S"])
        part["slide_of_spot_S"] = np.full(n_spots, index, dtype=np.int64)
        part["neighbour_SN"] = np.where(
            part["neighbour_SN"] >= 0, part["neighbour_SN"] + offset_spot, -1
        )
        region = part["region_of_spot_LS"]
        if offset_region is None:
            offset_region = np.zeros((len(region), 1), dtype=np.int64)
        part["region_of_spot_LS"] = np.where(region >= 0, region + offset_region, -1)
        offset_region = offset_region + regions.max(axis=1, keepdims=True, initial=-1) + 1
        offset_spot += n_spots
        arrays.append(part)
    shared = set.intersection(*(set(part) for part in arrays))
    joined = {
        name: np.concatenate(
            [part[name] for part in arrays], axis=1 if name == "region_of_spot_LS" else 0
        )
        for name in sorted(shared)
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in joined.items()}
    stains: list[StainMethod] = [slide.stain for slide, _, _ in parts if slide.use_patches]
    names = tuple(slide.slide_id for slide, _, _ in parts)
    return SlideBatch(**tensors, slide_ids=names, stain=stains[0] if stains else "none")


def iter_tiles(
    slide: PreparedSlide, hops: int, tile_spots: int = 1024
) -> Iterator[tuple[np.ndarray, SlideBatch]]:
    """Core spots of each tile and its batch; memory is set by the tile, not by the slide.

    Spots of a store lie along a space-filling curve, so a run of them is a compact tile.

    Args:
        slide: what to embed.
        hops: halo depth; spatial layers + 1 makes tiled and whole-slide results equal; -1: an
            encoder that reads the whole slide at once, so there is one tile.
        tile_spots: core spots of a tile.
    """
    tile_spots = slide.n_spots if hops < 0 else tile_spots
    no_regions = np.zeros((1, slide.n_spots), dtype=np.int64)
    for start in range(0, slide.n_spots, tile_spots):
        core = np.arange(start, min(start + tile_spots, slide.n_spots))
        yield core, collate([(slide, no_regions, core)], hops)
