"""The typed structures between data, model and losses.

Legend: S spots, K keyword genes, Q extra genes that are only predicted, V spot-vector length, N
neighbours, L region levels, R regions of a level, M pathways, H target genes, F stored image
features, C H W a patch, D embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preprocessing.stain import StainMethod

#: Fields of genes and of their values.
PAIRED_FIELDS = (
    ("gene_SK", "value_SK"),
    ("thinned_gene_SK", "thinned_value_SK"),
    ("query_gene_SQ", "query_value_SQ"),
)


@dataclass(frozen=True)
class SlideBatch:
    """Spots of one or more slides with their neighbours, as the towers read them.

    Attributes:
        gene_SK: vocabulary index of each keyword gene; ``n_genes`` is padding.
        value_SK: TF-IDF value of each keyword gene, falling along K; padding 0.
        vector_SV: the spot vector (own profile through the gene factors, standardised per slide).
        vector_scale_SV: what one unit of raw projection adds to ``vector_SV`` (so that the
            vector without masked genes can be computed, docs/method.md 3).
        neighbour_SN: index in this batch of each spatial neighbour; -1 is none.
        distance_um_SN: distance to it in micrometres; inf where none.
        xy_um_S2: centres in micrometres.
        slide_of_spot_S: 0..B-1 within the batch.
        spot_group_S: the gene graph of each spot, 0..T-1 (label-free groups of spots).
        core_S: False marks halo spots, which are context only.
        region_of_spot_LS: region id at each level, unique in the batch; -1 for the halo.
        slide_ids: the B slides.
        target_SM: soft pathway targets (rows sum to 1, or 0 for "no target").
        expression_SH: target genes, log-normalised and standardised per slide.
        frequency_SH: the same genes as shares of a spot's counts (rows of unit length; intensities:
            as above), standardised per slide.
        features_SF: stored image features, standardised per slide.
        patches_SCHW: image patches, uint8 RGB.
        context_SCHW: wider patches of the same spots with as many pixels, uint8 RGB.
        stain: what the patches of each slide were brought to one stain with, or none.
        stain_S6: the slide's mean and sd of R, G, B (0..1), for per-slide standardising.
        thinned_gene_SK: keyword genes of a second view of each spot, from thinned counts.
        thinned_value_SK: their values.
        thinned_vector_SV: spot vector of that view.
        query_gene_SQ: vocabulary genes whose value the masked view also predicts; ``n_genes``
            is padding.
        query_value_SQ: their TF-IDF values, mostly 0.
        part_SK: weight of each keyword gene in the spot vector, which leaves it when the gene is
            masked; None where that is ``value_SK``. ``thinned_part_SK`` and ``query_part_SQ`` are
            those of the other two.
    """

    gene_SK: Tensor
    value_SK: Tensor
    vector_SV: Tensor
    vector_scale_SV: Tensor
    neighbour_SN: Tensor
    distance_um_SN: Tensor
    xy_um_S2: Tensor
    slide_of_spot_S: Tensor
    spot_group_S: Tensor
    core_S: Tensor
    region_of_spot_LS: Tensor
    slide_ids: tuple[str, ...]
    target_SM: Tensor | None = None
    expression_SH: Tensor | None = None
    frequency_SH: Tensor | None = None
    features_SF: Tensor | None = None
    patches_SCHW: Tensor | None = None
    context_SCHW: Tensor | None = None
    stain: StainMethod = "none"
    stain_S6: Tensor | None = None
    thinned_gene_SK: Tensor | None = None
    thinned_value_SK: Tensor | None = None
    thinned_vector_SV: Tensor | None = None
    query_gene_SQ: Tensor | None = None
    query_value_SQ: Tensor | None = None
    part_SK: Tensor | None = None
    thinned_part_SK: Tensor | None = None
    query_part_SQ: Tensor | None = None

    def __post_init__(self) -> None:
        n_spots = self.n_spots
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            rows = value.shape[1] if field.name == "region_of_spot_LS" else value.shape[0]
            if rows != n_spots:
                raise ValueError(
                    f"SlideBatch.{field.name} has {rows} spots, gene_SK has {n_spots}; "
                    "all spot axes must agree"
                )
        for gene, value in PAIRED_FIELDS:
            found = [getattr(getattr(self, name), "shape", None) for name in (gene, value)]
            if found[0] != found[1]:
                raise ValueError(
                    f"SlideBatch: {gene} and {value} must have one shape, found {found[0]} and "
                    f"{found[1]}"
                )

    @property
    def n_spots(self) -> int:
        """Spots in the batch, halo included."""
        return int(self.gene_SK.shape[0])

    @property
    def parts_SK(self) -> Tensor:
        """Weight of each keyword gene in the spot vector."""
        return self.value_SK if self.part_SK is None else self.part_SK

    @property
    def has_image(self) -> bool:
        """Whether an image tower can read this batch."""
        return self.features_SF is not None or self.patches_SCHW is not None

    def to(self, device: torch.device | str) -> SlideBatch:
        """The same batch with every tensor on ``device``."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> SlideBatch:
        """The same batch in page-locked memory, from which a GPU copies without waiting."""
        return self._with(Tensor.pin_memory)

    def _with(self, changed: Callable[[Tensor], Tensor]) -> SlideBatch:
        tensors: dict[str, Any] = {
            field.name: changed(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


def lone_spots(
    gene_SK: Tensor, value_SK: Tensor, vector_SV: Tensor, spot_group_S: Tensor, **fields: Any
) -> SlideBatch:
    """Spots without neighbours, place or region, all core; ``fields`` says the rest."""
    n_spots = len(gene_SK)
    return SlideBatch(
        gene_SK=gene_SK,
        value_SK=value_SK,
        vector_SV=vector_SV,
        vector_scale_SV=torch.ones_like(vector_SV),
        neighbour_SN=gene_SK.new_full((n_spots, 1), -1),
        distance_um_SN=value_SK.new_full((n_spots, 1), float("inf")),
        xy_um_S2=value_SK.new_zeros(n_spots, 2),
        spot_group_S=spot_group_S,
        core_S=torch.ones(n_spots, dtype=torch.bool, device=gene_SK.device),
        region_of_spot_LS=gene_SK.new_zeros(1, n_spots),
        **fields,
    )


@dataclass(frozen=True)
class LevelPair:
    """Projected, L2-normalised embeddings of one level (n items), row i of each the same item.

    Attributes:
        image: (n, D), or None when the batch has no image.
        omics: (n, D).
        group: (n,) slide of each item.
    """

    image: Tensor | None
    omics: Tensor
    group: Tensor


@dataclass(frozen=True)
class MaskedView:
    """Predictions of the masked view: values (S, K), own vector (S, V), niche (S, H)."""

    value_SK: Tensor
    own_SV: Tensor
    niche_SH: Tensor


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns: the weighted total, every unweighted term, and how many items it saw."""

    total: Tensor
    terms: dict[str, Tensor]
    n: int
