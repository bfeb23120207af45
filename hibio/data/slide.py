"""One slide as the model needs it: expression, spot vectors, graph, image features.

Legend: S spots, V spot-vector length, N neighbours, F image features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hibio.artifacts import Artifacts
from hibio.config import ConfigError
from hibio.data.counts import CountSource, PanelMap, StoreCounts
from hibio.data.expression import SlideExpression, read_expression
from hibio.data.lost_store import reading
from hibio.data.slide_image import check_widths, image_fields, standardise_columns
from hibio.image_input import PATCHES, ImageInput
from preprocessing.coexpression import standardise
from preprocessing.graphs import KNNGraph, SpotGraph
from preprocessing.slide_stain import StainMethod, StainNormaliser
from preprocessing.store import SlideStore

__all__ = [
    "PATCHES",
    "PreparedSlide",
    "expression_slide",
    "prepare_slide",
    "random_neighbours",
    "standardise_columns",
]


@dataclass(frozen=True)
class PreparedSlide:
    """A slide on the vocabulary of one set of artifacts; axes as in :class:`hibio.SlideBatch`.

    Attributes:
        path: store the patches are read from, when ``use_patches``.
        expression: what is computed from a spot's counts alone, by row.
        vector_mean_V: slide mean that was taken off the raw spot vectors.
        vector_scale_V: slide scale they were multiplied by.
        spot_group_S: label-free group of each spot, which names its gene graph.
        stain_6: mean and sd of R, G, B of its patches as they are read.
        genes_matched: vocabulary genes that this slide measured (folded-in ones too).
        genes_folded_in: how many of these were folded in after training.
        genes_dropped: genes of this slide outside the vocabulary (not used).
        use_context: whether the wider patches of its spots are read too.
        stain: what its patches are brought to one stain with.
        normaliser: does it, with what was measured on this slide alone.
    """

    slide_id: str
    patient_id: str
    path: Path | None
    xy_um: np.ndarray
    graph: SpotGraph
    expression: SlideExpression
    vector_SV: np.ndarray
    vector_mean_V: np.ndarray
    vector_scale_V: np.ndarray
    spot_group_S: np.ndarray
    neighbour_SN: np.ndarray
    distance_um_SN: np.ndarray
    features_SF: np.ndarray | None
    use_patches: bool
    stain_6: np.ndarray | None
    genes_matched: int
    genes_folded_in: int
    genes_dropped: int
    has_counts: bool = True
    use_context: bool = False
    stain: StainMethod = "none"
    normaliser: StainNormaliser | None = None

    @property
    def n_spots(self) -> int:
        """Number of spots."""
        return len(self.xy_um)

    @property
    def has_image(self) -> bool:
        """Whether an image tower can read this slide."""
        return self.features_SF is not None or self.use_patches

    def patches(self, spots: np.ndarray) -> np.ndarray:
        """Patches of ``spots``, uint8 (n, px, px, 3), in the stain that was asked for."""
        return self._pictures(lambda store: store.patches(spots))

    def context(self, spots: np.ndarray) -> np.ndarray:
        """Wider patches of ``spots``, uint8 (n, px, px, 3), in the same stain."""
        return self._pictures(lambda store: store.context(spots))

    def _pictures(self, read: Callable[[SlideStore], np.ndarray]) -> np.ndarray:
        if self.path is None or not self.use_patches:
            raise ConfigError(f"slide {self.slide_id!r} has no patches to read")
        with reading(self.path, self.slide_id), SlideStore(self.path) as store:
            pictures = read(store)
        return pictures if self.normaliser is None else self.normaliser(pictures)


def prepare_slide(
    path: Path,
    artifacts: Artifacts,
    image: ImageInput | str | None,
    hidden: Collection[str] = (),
) -> PreparedSlide:
    """Read one store and compute what the towers read from it.

    Args:
        path: the store.
        artifacts: fitted on training slides.
        image: what the vision tower reads (``model.config.vision.image_input(key)``); a stored
            feature key ("handcrafted") or ``patches`` as they are; None for counts only.
        hidden: genes to treat as not measured; their counts take no part in anything.

    Raises:
        ConfigError: the store has an image but not these features or no context, shares too few
            genes, or holds another modality than the model was trained on.
    """
    image = ImageInput(image) if isinstance(image, str) else image
    with SlideStore(path) as store:
        if store.has_counts and store.modality != artifacts.modality:
            raise ConfigError(
                f"store {path}: modality {store.modality}, the model was trained on "
                f"{artifacts.modality}; use slides of one modality"
            )
        panel = PanelMap.between(store.gene_names, artifacts.genes, hidden, artifacts.n_folded_in)
        known: dict[str, Any] = {"path": path}
        if image is not None and store.has_image:
            check_widths(store, image, artifacts.settings)
            known |= image_fields(store, image)
        slide = expression_slide(
            StoreCounts(path, panel, store.n_spots),
            store.xy_um,
            artifacts,
            slide_id=store.slide_id,
            patient_id=store.patient_id,
            matched=panel.matched,
            measured=panel.measured,
            folded_in=panel.folded_in,
        )
    return dataclasses.replace(slide, **known)


def expression_slide(
    source: CountSource,
    xy_um: np.ndarray,
    artifacts: Artifacts,
    *,
    slide_id: str,
    patient_id: str = "",
    matched: int,
    measured: int,
    folded_in: int = 0,
) -> PreparedSlide:
    """The omics half of a slide, streamed over its counts.

    A slide that measures no gene at all (an image alone) gets padding and zeros.

    Args:
        source: counts on the vocabulary.
        xy_um: (S, 2) centres in micrometres.
        artifacts: fitted on training slides.
        slide_id: for messages.
        patient_id: of the slide.
        matched: vocabulary genes that it measures.
        measured: genes that it measures.
        folded_in: matched genes that were folded in after training.

    Raises:
        ConfigError: fewer than 20 vocabulary genes were measured (of a smaller vocabulary: fewer
            than half).
    """
    _check_matched(slide_id, matched, measured, artifacts)
    genes = artifacts.settings["genes"]
    expression, raw = read_expression(source, artifacts)
    vector, mean, scale = standardise(raw, artifacts.factors)
    graph = KNNGraph(k=genes["neighbours"]).build(xy_um)
    neighbour, distance = graph.neighbours(genes["neighbours"])
    if genes["graph"] == "random":
        neighbour, distance = random_neighbours(xy_um, genes["neighbours"])
    return PreparedSlide(
        slide_id=slide_id,
        patient_id=patient_id,
        path=None,
        xy_um=xy_um.astype(np.float32),
        graph=graph,
        expression=expression,
        vector_SV=vector,
        vector_mean_V=mean,
        vector_scale_V=scale,
        spot_group_S=artifacts.groups.assign(vector),
        neighbour_SN=neighbour.astype(np.int64),
        distance_um_SN=distance,
        features_SF=None,
        use_patches=False,
        stain_6=None,
        genes_matched=matched,
        genes_folded_in=folded_in,
        genes_dropped=measured - matched,
        has_counts=measured > 0,
    )


def _check_matched(slide_id: str, matched: int, measured: int, artifacts: Artifacts) -> None:
    need = min(20, -(-artifacts.n_genes // 2))
    if measured and matched < need:
        raise ConfigError(
            f"slide {slide_id!r} measures {matched} of the {artifacts.n_genes} genes that the "
            f"model knows (first of them: {', '.join(artifacts.genes[:3])}), at least {need} are "
            "needed; check the organism and the gene id type of this slide, or give slides that "
            "measure both its genes and the model's: hibio embed --fold-in DIR"
        )


def random_neighbours(xy_um: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Random spots (S, k) of the slide in the place of neighbours, and their distances in um."""
    n_spots = len(xy_um)
    rng = np.random.default_rng(n_spots)
    step = rng.integers(1, max(n_spots, 2), size=(n_spots, k))  # never the spot itself
    chosen = (np.arange(n_spots)[:, None] + step) % n_spots
    distance = np.linalg.norm(xy_um[chosen] - xy_um[:, None], axis=2)
    return chosen, distance.astype(np.float32)
