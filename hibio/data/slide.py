"""One slide as the model needs it: keyword genes, spot vectors, graph, targets, image features.

Legend: S spots, K keyword genes, V spot-vector length, N neighbours, M pathways, H target genes,
F image features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from hibio.artifacts import Artifacts
from hibio.config import ConfigError
from hibio.data.fitting import align_columns
from pathways.anchors import soft_targets
from preprocessing.coexpression import spot_vectors, standardise
from preprocessing.graphs import KNNGraph, SpotGraph
from preprocessing.store import SlideStore

#: Value of ``image`` that reads patches from the store (for a timm tower).
PATCHES = "patches"


@dataclass(frozen=True)
class PreparedSlide:
    """A slide on the vocabulary of one set of artifacts; axes as in :class:`hibio.SlideBatch`.

    Attributes:
        path: store the patches are read from, when ``use_patches``.
        genes_matched: vocabulary genes that this slide measured.
        genes_dropped: genes of this slide outside the vocabulary (not used).
    """

    slide_id: str
    patient_id: str
    path: Path | None
    xy_um: np.ndarray
    graph: SpotGraph
    gene_SK: np.ndarray
    value_SK: np.ndarray
    vector_SV: np.ndarray
    vector_scale_V: np.ndarray
    neighbour_SN: np.ndarray
    distance_um_SN: np.ndarray
    target_SM: np.ndarray
    expression_SH: np.ndarray
    features_SF: np.ndarray | None
    use_patches: bool
    stain_6: np.ndarray | None
    genes_matched: int
    genes_dropped: int
    has_counts: bool = True

    @property
    def n_spots(self) -> int:
        """Number of spots."""
        return len(self.xy_um)

    @property
    def has_image(self) -> bool:
        """Whether an image tower can read this slide."""
        return self.features_SF is not None or self.use_patches

    def patches(self, spots: np.ndarray) -> np.ndarray:
        """Patches of ``spots``, uint8 (n, px, px, 3)."""
        if self.path is None or not self.use_patches:
            raise ConfigError(f"slide {self.slide_id!r} has no patches to read")
        with SlideStore(self.path) as store:
            return store.patches(spots)


def prepare_slide(path: Path, artifacts: Artifacts, image: str | None) -> PreparedSlide:
    """Read one store and compute what the towers read from it.

    Args:
        path: the store.
        artifacts: fitted on training slides.
        image: a stored feature key ("handcrafted"), ``patches``, or None for counts only.

    Raises:
        ConfigError: the store has an image but not these features, or shares too few genes.
    """
    with SlideStore(path) as store:
        counts = align_columns(store.counts(), store.gene_names, artifacts.genes)
        matched = len({*artifacts.genes} & {*store.gene_names})
        features, stain = _image_inputs(store, image)
        if features is not None or stain is not None:
            _check_patch_width(store, artifacts.settings["patch_um"])
        slide = expression_slide(
            counts,
            store.xy_um,
            artifacts,
            slide_id=store.slide_id,
            patient_id=store.patient_id,
            matched=matched,
            measured=len(store.gene_names),
        )
        use_patches = image == PATCHES and store.has_image
    return PreparedSlide(
        **{
            **vars(slide),
            "path": path,
            "features_SF": features,
            "use_patches": use_patches,
            "stain_6": stain,
        }
    )


def expression_slide(
    counts: sparse.csr_matrix,
    xy_um: np.ndarray,
    artifacts: Artifacts,
    *,
    slide_id: str,
    patient_id: str = "",
    matched: int,
    measured: int,
) -> PreparedSlide:
    """The omics half of a slide, from counts that are already on the vocabulary.

    A slide that measures no gene at all (an image alone) gets padding and zeros.

    Raises:
        ConfigError: fewer than 20 vocabulary genes were measured.
    """
    if measured and matched < min(20, artifacts.n_genes):
        raise ConfigError(
            f"slide {slide_id!r} measures {matched} of the {artifacts.n_genes} genes that the "
            f"model was trained on (first of them: {', '.join(artifacts.genes[:3])}); check the "
            "organism and the gene id type of this slide"
        )
    genes = artifacts.settings["genes"]
    pathways = artifacts.settings["pathways"]
    tfidf = artifacts.tfidf.transform(counts)
    gene, value = artifacts.keywords(tfidf, genes["keyword_genes"])
    vector, _, scale = standardise(spot_vectors(tfidf, artifacts.factors), artifacts.factors)
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
        gene_SK=gene.astype(np.int64),
        value_SK=value,
        vector_SV=vector.astype(np.float32),
        vector_scale_V=scale.astype(np.float32),
        neighbour_SN=neighbour.astype(np.int64),
        distance_um_SN=distance,
        target_SM=soft_targets(
            artifacts.anchors.match(tfidf),
            temperature=pathways["temperature"],
            top=pathways["top"],
            threshold=pathways["threshold"],
        ),
        expression_SH=_expression_targets(counts, artifacts.target_genes),
        features_SF=None,
        use_patches=False,
        stain_6=None,
        genes_matched=matched,
        genes_dropped=measured - matched,
        has_counts=measured > 0,
    )


def random_neighbours(xy_um: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Random spots (S, k) of the slide in the place of neighbours, and their distances in um."""
    n_spots = len(xy_um)
    rng = np.random.default_rng(n_spots)
    step = rng.integers(1, max(n_spots, 2), size=(n_spots, k))  # never the spot itself
    chosen = (np.arange(n_spots)[:, None] + step) % n_spots
    distance = np.linalg.norm(xy_um[chosen] - xy_um[:, None], axis=2)
    return chosen, distance.astype(np.float32)


def standardise_columns(values: np.ndarray) -> np.ndarray:
    """Columns to mean 0 and sd 1 over the spots of one slide; constant columns become 0."""
    values = np.asarray(values, dtype=np.float64)
    sd = values.std(axis=0)
    centred = values - values.mean(axis=0)
    return (centred / np.where(sd > 1e-8, sd, np.inf)).astype(np.float32)


def log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """ln(1 + 10^4 x / depth) of each spot; a spot without counts stays 0."""
    depth = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(1e4, depth, out=np.zeros(len(depth)), where=depth > 0)
    result = sparse.csr_matrix(sparse.diags(scale) @ counts, dtype=np.float32)
    np.log1p(result.data, out=result.data)
    return result


def _expression_targets(counts: sparse.csr_matrix, targets: np.ndarray) -> np.ndarray:
    return standardise_columns(log_normalise(counts)[:, targets].toarray())


def _check_patch_width(store: SlideStore, trained_um: float | None) -> None:
    """An image is embedded at the physical patch width that the model was trained on."""
    own_um = float(store.attrs["patch_um"])
    if trained_um is not None and abs(own_um - trained_um) > 0.01 * trained_um:
        raise ConfigError(
            f"store {store.path}: patches are {own_um:g} um wide, the model was trained on "
            f"{trained_um:g} um; prepare again with --patch-um {trained_um:g}"
        )


def _image_inputs(
    store: SlideStore, image: str | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Standardised features (S, F), or the stain statistics that patches need."""
    if image is None or not store.has_image:
        return None, None
    if image == PATCHES:
        sample = np.linspace(0, store.n_spots - 1, min(store.n_spots, 64)).astype(int)
        pixels = store.patches(np.unique(sample)).reshape(-1, 3).astype(np.float32) / 255.0
        return None, np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])
    if image not in store.feature_names:
        raise ConfigError(
            f"store {store.path}: no features {image!r} (it has: "
            f"{', '.join(store.feature_names) or 'none'}); prepare again, or set data.image to "
            f"one of these or to {PATCHES!r}"
        )
    return standardise_columns(store.features(image)), None
