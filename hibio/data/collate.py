"""Core spots of one or more slides, plus the halo that they need, as one SlideBatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hibio.batch import SlideBatch
from hibio.data.slide import PreparedSlide
from hibio.data.views import Views, view_arrays
from preprocessing.slide_stain import StainMethod


def with_halo(neighbour_SN: np.ndarray, core: np.ndarray, hops: int) -> np.ndarray:
    """``core``, then every spot within ``hops`` steps on the spatial graph (-1: all others)."""
    inside = np.zeros(len(neighbour_SN), dtype=bool)
    inside[core] = True
    order = [core]
    front = core
    if hops < 0:  # the whole slide
        return np.concatenate([core, np.flatnonzero(~inside)])
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
    }
    if views is not None:
        part |= view_arrays(slide, spots, views)
    if slide.features_SF is not None:
        part["features_SF"] = slide.features_SF[spots]
    if slide.use_patches:
        part["patches_SCHW"] = _of_core(slide.patches(core), len(spots))
        if slide.use_context:
            part["context_SCHW"] = _of_core(slide.context(core), len(spots))
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
