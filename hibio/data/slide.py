"""One slide as the model needs it: expression, spot vectors, graph, image features.

A small slide holds it in memory; of a large one it is computed from the store, for the spots of a
tile, so that memory is set by the tile. Views for training (thinned counts, genes to be guessed)
come from the same counts.

Legend: S spots, n spots asked for, K keyword genes, V spot-vector length, N neighbours, M pathways,
H target genes, Q query genes, G vocabulary, F image features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from hibio.artifacts import Artifacts, FitSettings
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES, ImageInput, VisionConfig
from hibio.data.counts import ArrayCounts, CountSource, PanelMap, StoreCounts, reading
from hibio.data.splits import SlideEntry
from hibio.data.stored_features import StoredFeatures, standardise_columns
from hibio.regions import fused_features
from preprocessing.coexpression import spot_vectors, standardise
from preprocessing.errors import DataError
from preprocessing.graphs import SpotGraph, spatial_graph
from preprocessing.selection import normalised
from preprocessing.stain import StainMethod, StainNormaliser, sample_patches, stain_normaliser
from preprocessing.store import SlideStore

IN_MEMORY_SPOTS = 20_000  # a slide up to this size is kept whole
CHUNK_SPOTS = 20_000  # rows in memory at once while a larger one is streamed


def colour_statistics(patches: np.ndarray) -> np.ndarray:
    """Mean and sd of R, G, B over all pixels of uint8 (n, px, px, 3), (6,) float32 in 0..1."""
    pixels = patches.reshape(-1, 3).astype(np.float32) / 255.0
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])


def check_widths(store: SlideStore, image: ImageInput, settings: FitSettings) -> None:
    """Compare the physical patch widths with those that the model was trained on.

    Raises:
        ConfigError: another width, or no context although it is read.
    """
    _check_width(store.path, "patches", store.attrs["patch_um"], settings.patch_um, "--patch-um")
    if not image.context:
        return
    if store.context_um is None:
        raise ConfigError(
            f"store {store.path}: no context patches, which model.vision.context: patch reads; "
            "prepare again with --context-um UM, or set it to none"
        )
    for trained_um in settings.context_um:
        _check_width(store.path, "context", store.context_um, trained_um, "--context-um")


def _check_width(
    path: Path, what: str, own_um: float, trained_um: float | None, option: str
) -> None:
    if trained_um is not None and abs(own_um - trained_um) > 0.01 * trained_um:
        raise ConfigError(
            f"store {path}: {what} are {own_um:g} um wide, the model was trained on "
            f"{trained_um:g} um; prepare again with {option} {trained_um:g}"
        )


def image_fields(store: SlideStore, image: ImageInput, *, whole: bool = True) -> dict[str, Any]:
    """Fields of a `PreparedSlide`: standardised features (S, F), or how its patches are read.

    The features of a slide of more than `IN_MEMORY_SPOTS` spots, or not ``whole``, stay in its
    store.

    Raises:
        ConfigError: no such features, or a slide whose stain cannot be measured.
    """
    if image.key == PATCHES:
        sample = sample_patches(store)
        try:
            normaliser = stain_normaliser(image.stain, sample)
        except DataError as error:
            raise ConfigError(
                f"store {store.path}: {error}: set model.vision.stain: none, or leave the slide out"
            ) from error
        return {
            "use_patches": True,
            "use_context": image.context,
            "stain": image.stain,
            "normaliser": None if image.stain == "none" else normaliser,
            "stain_6": colour_statistics(normaliser(sample)),
        }
    if image.key not in store.feature_names:
        raise ConfigError(
            f"store {store.path}: no features {image.key!r} (it has: "
            f"{', '.join(store.feature_names) or 'none'}); prepare again, or set data.image to "
            f"one of these or to {PATCHES!r}"
        )
    if whole and store.n_spots <= IN_MEMORY_SPOTS:
        return {"features_SF": standardise_columns(store.features(image.key))}
    return {"features_SF": StoredFeatures.of(store, image.key)}


def sized_vision(
    config: VisionConfig, key: str | None, entries: Sequence[SlideEntry]
) -> VisionConfig:
    """The vision section with the size of its input, as the first store with an image has it.

    Args:
        config: of a run.
        key: its ``data.image``.
        entries: training slides; without an image among them there is no tower.
    """
    image = config.image_input(key)
    paired = [entry for entry in entries if entry.has_image]
    if image is None or not paired:
        return dataclasses.replace(config, name="none")
    if image.key == PATCHES:
        return config
    with SlideStore(paired[0].path) as store:
        features_SF = image_fields(store, image, whole=False)["features_SF"]
    return dataclasses.replace(config, feature_dim=features_SF.shape[1])


@dataclass(frozen=True)
class ExpressionRows:
    """Rows of some spots; see :class:`hibio.SlideBatch` for each."""

    gene_SK: np.ndarray
    value_SK: np.ndarray
    target_SM: np.ndarray
    expression_SH: np.ndarray
    frequency_SH: np.ndarray
    part_SK: np.ndarray | None = None

    def take(self, spots: np.ndarray) -> ExpressionRows:
        """The rows of ``spots``."""
        given = {name: own[spots] for name, own in vars(self).items() if own is not None}
        return ExpressionRows(**given)


@dataclass(frozen=True)
class SlideExpression:
    """Expression rows of one slide on request.

    Attributes:
        source: its counts on the vocabulary.
        artifacts: fitted on training slides.
        niche_SN: spots whose counts weigh the genes of each (-1 pads), or None.
        mean_H: slide mean of each target gene, log-normalised and then as a frequency (2 H).
        sd_H: its standard deviation; inf for a gene that does not vary.
        kept: all rows, or one that all spots have, or None: they are computed when asked for.
    """

    source: CountSource
    artifacts: Artifacts
    niche_SN: np.ndarray | None
    mean_H: np.ndarray
    sd_H: np.ndarray
    kept: ExpressionRows | None = None

    def rows(self, spots: np.ndarray) -> ExpressionRows:
        """Rows of ``spots``, in their order."""
        if self.kept is not None:
            alike = len(self.kept.gene_SK) == 1
            return self.kept.take(np.zeros_like(spots) if alike else spots)
        return self.compute(*self.read(spots))

    def read(self, spots: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        """Counts of ``spots`` (n) and behind them of their niches; where each niche (n, N) lies."""
        if self.niche_SN is None:
            return self.source.rows(spots), None
        near = self.niche_SN[spots]
        local = np.full(self.source.n_spots + 1, -1)  # the last entry answers index -1
        local[spots] = np.arange(len(spots))
        beside = np.unique(near[(near >= 0) & (local[near] < 0)])
        local[beside] = len(spots) + np.arange(len(beside))
        return self.source.rows(np.concatenate([spots, beside])), local[near]

    def compute(self, counts: sparse.csr_matrix, near: np.ndarray | None) -> ExpressionRows:
        """Rows of what `read` gives."""
        fitted = self.artifacts
        tfidf, profile = fitted.weigh(counts, near)
        gene, value = fitted.keywords(tfidf, fitted.settings.genes.keyword_genes)
        targets = (_target_genes(counts[: len(gene)], fitted) - self.mean_H) / self.sd_H
        expression, frequency = np.split(targets.astype(np.float32), 2, axis=1)
        return ExpressionRows(
            gene.astype(np.int64),
            value,
            fitted.pathway_targets(tfidf),
            expression,
            frequency,
            None if profile is tfidf else _values_at(profile, gene),
        )

    def thinned(
        self, spots: np.ndarray, keep: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """A second view of spots: every count survives with probability ``keep``.

        Intensities are not counts and stay as they are.

        Returns:
            gene, value and weight in the spot vector (None: the value), (n, K) each, and raw
            spot vector (n, V) of the thinned counts.
        """
        counts, near = self.read(spots)
        if self.artifacts.modality == "rna":
            counts = counts.copy()
            counts.data = rng.binomial(counts.data.astype(np.int64), keep).astype(counts.dtype)
            counts.eliminate_zeros()
        tfidf, profile = self.artifacts.weigh(counts, near)
        k = self.artifacts.settings.genes.keyword_genes
        gene, value = self.artifacts.keywords(tfidf, k)
        part = None if profile is tfidf else _values_at(profile, gene)
        vector = spot_vectors(profile, self.artifacts.factors)
        return gene.astype(np.int64), value, part, vector

    def queries(
        self, spots: np.ndarray, n_genes: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Genes to be guessed that are not among a spot's keywords, mostly unexpressed ones.

        Args:
            spots: (n,).
            n_genes: Q, drawn evenly from the vocabulary.
            rng: of the draw.

        Returns:
            gene (n, Q), padded with G where the draw met a keyword or repeats itself, its TF-IDF
            value and its weight in the spot vector (None: the value), (n, Q) each.
        """
        n_vocabulary = self.artifacts.n_genes
        tfidf, profile = self.artifacts.weigh(*self.read(spots))
        gene = np.sort(rng.integers(0, n_vocabulary, size=(len(spots), n_genes)), axis=1)
        known = np.zeros((len(spots), n_vocabulary + 1), dtype=bool)
        np.put_along_axis(known, self.rows(spots).gene_SK, True, axis=1)
        taken = np.take_along_axis(known, gene, axis=1)
        taken[:, 1:] |= gene[:, 1:] == gene[:, :-1]
        gene = np.where(taken, n_vocabulary, gene)
        part = None if profile is tfidf else _values_at(profile, gene)
        return gene, _values_at(tfidf, gene), part


def read_expression(
    source: CountSource, artifacts: Artifacts, niche_SN: np.ndarray | None, *, unread: bool = False
) -> tuple[SlideExpression, np.ndarray]:
    """Stream a slide once: its expression, raw vectors (S, V); ``unread`` rows are alike: zeros."""
    vectors: list[np.ndarray] = []
    total = np.zeros(2 * len(artifacts.target_genes))
    square = np.zeros_like(total)
    slide = SlideExpression(source, artifacts, niche_SN, total, square)
    n_read = 1 if unread else source.n_spots
    whole = n_read <= IN_MEMORY_SPOTS
    step = n_read if whole else CHUNK_SPOTS
    for start in range(0, n_read, step):
        spots = np.arange(start, min(start + step, n_read))
        counts, near = slide.read(spots)
        weighted = artifacts.vector_tfidf.transform(counts, near)[: len(spots)]
        vectors.append(spot_vectors(weighted, artifacts.factors))
        targets = _target_genes(counts[: len(spots)], artifacts).astype(np.float64)
        total += targets.sum(axis=0)
        square += (targets**2).sum(axis=0)
    mean = total / n_read
    sd = np.sqrt(np.maximum(square / n_read - mean**2, 0.0))
    sd = np.where(sd > 1e-6, sd, np.inf)
    slide = dataclasses.replace(slide, mean_H=mean, sd_H=sd)
    if whole:
        slide = dataclasses.replace(slide, kept=slide.compute(counts, near))
    vector_SV = np.concatenate(vectors)
    return slide, vector_SV.repeat(source.n_spots, axis=0) if unread else vector_SV


def _values_at(rows: sparse.csr_matrix, gene: np.ndarray) -> np.ndarray:
    """Values (n, K) float32 of rows (n, G) at genes (n, K); the padding index G has 0."""
    n_genes = rows.shape[1]
    spot = np.arange(len(gene))[:, None]
    value = np.asarray(rows[spot, np.minimum(gene, n_genes - 1)].todense(), dtype=np.float32)
    return np.where(gene < n_genes, value, 0.0).astype(np.float32)


def _target_genes(counts: sparse.csr_matrix, artifacts: Artifacts) -> np.ndarray:
    """Target genes (n, 2 H): log-normalised, then their frequencies in rows of unit length."""
    log = normalised(counts, artifacts.modality)
    rows = normalize(counts) if artifacts.modality == "rna" else log
    return np.hstack([one[:, artifacts.target_genes].toarray() for one in (log, rows)])


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
    features_SF: np.ndarray | StoredFeatures | None
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

    def fused(self, *embeddings_SD: np.ndarray | None) -> np.ndarray:
        """What its region trees cluster (S, F), of the counts and of embeddings that there are."""
        vector_SV = self.vector_SV if self.has_counts else None
        return fused_features(vector_SV, self.neighbour_SN, embeddings_SD)

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
    *,
    counts: bool = True,
) -> PreparedSlide:
    """Read one store and compute what the towers read from it.

    Args:
        path: the store.
        artifacts: fitted on training slides.
        image: what the vision tower reads (``model.config.vision.image_input(key)``); a stored
            feature key ("handcrafted") or ``patches`` as they are; None for counts only.
        hidden: genes to treat as not measured; their counts take no part in anything.
        counts: False leaves all counts unread, for what is asked of the image alone, and stored
            features in the store until a tile asks for them.

    Raises:
        ConfigError: the store has an image but not these features or no context, shares too few
            genes, or holds another modality than the model was trained on.
    """
    image = ImageInput(image) if isinstance(image, str) else image
    with SlideStore(path) as store:
        if counts and store.has_counts and store.modality != artifacts.modality:
            raise ConfigError(
                f"store {path}: modality {store.modality}, the model was trained on "
                f"{artifacts.modality}; use slides of one modality"
            )
        panel = PanelMap.between(store.gene_names, artifacts.genes, hidden, artifacts.n_folded_in)
        known: dict[str, Any] = {"path": path}
        if image is not None and store.has_image:
            check_widths(store, image, artifacts.settings)
            known |= image_fields(store, image, whole=counts)
        nothing = sparse.csr_matrix((store.n_spots, artifacts.n_genes), dtype=int)
        slide = expression_slide(
            StoreCounts(path, panel, store.n_spots) if counts else ArrayCounts(nothing),
            store.xy_um,
            artifacts,
            slide_id=store.slide_id,
            patient_id=store.patient_id,
            matched=panel.matched,
            measured=panel.measured,
            folded_in=panel.folded_in,
            unread=not counts,
        )
    return dataclasses.replace(slide, **known, has_counts=slide.has_counts and counts)


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
    unread: bool = False,
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
        unread: nobody looks at the counts, which are zeros: one row is made and stands for all.

    Raises:
        ConfigError: fewer than 20 vocabulary genes were measured (of a smaller vocabulary: fewer
            than half), where the counts are looked at.
    """
    _check_matched(slide_id, matched, 0 if unread else measured, artifacts)
    genes = artifacts.settings.genes
    expression, raw = read_expression(source, artifacts, artifacts.niche(xy_um), unread=unread)
    vector, mean, scale = standardise(raw, artifacts.factors)
    graph = spatial_graph(genes.graph, genes.neighbours, xy_um)
    neighbour, distance = graph.neighbours(genes.neighbours)
    if genes.graph == "random":
        neighbour, distance = random_neighbours(xy_um, genes.neighbours)
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
