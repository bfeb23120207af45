"""Prepared slides behind a bounded cache, and slides that are given as AnnData or images."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from hibio.artifacts import Artifacts
from hibio.batch import SlideBatch, lone_spots
from hibio.config.files import ConfigError
from hibio.config.model import ImageInput
from hibio.data.collate import collate
from hibio.data.counts import ArrayCounts, PanelMap, reading
from hibio.data.slide import (
    PreparedSlide,
    colour_statistics,
    expression_slide,
    prepare_slide,
)
from hibio.data.splits import SlideEntry
from hibio.data.stored_features import standardise_columns
from hibio.keys import OBSM_SPATIAL, OBSM_UM
from preprocessing.readers.coordinates import VISIUM_PITCH_UM, frame_xy, hex_pitch_px
from preprocessing.scale import SPACING_UM, spacing_um
from preprocessing.sections import SUFFIX, several_sections
from preprocessing.spot_table import RNA, even_total, native_numbers
from preprocessing.stain import StainMethod, stain_normaliser

_COUNTS = "counts"  # the layer that is taken where X holds none
_UNIT_TOLERANCE = 0.1


class PreparedSlides:
    """Slides by index; at most ``cache`` of them are held, so memory does not grow with the corpus.

    Args:
        entries: the slides, in order.
        artifacts: fitted on training slides.
        image: how an image is read; a stored feature key or ``patches`` as they are; None: not
            (see :func:`prepare_slide`).
        cache: slides kept in memory.
        shuffle_pairs: give every spot the image of another spot of its slide (the control that
            shows what is learned from pairing; docs/method.md 6).

    Asking for a slide whose store has vanished or is damaged is a `DataError` that names it.
    """

    def __init__(
        self,
        entries: Sequence[SlideEntry],
        artifacts: Artifacts,
        image: ImageInput | str | None,
        cache: int = 64,
        shuffle_pairs: bool = False,
    ) -> None:
        self.entries = tuple(entries)
        self.artifacts = artifacts
        self.image = image
        self.cache = cache
        self.shuffle_pairs = shuffle_pairs
        self._slides: OrderedDict[int, PreparedSlide] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PreparedSlide:
        if index in self._slides:
            self._slides.move_to_end(index)
            return self._slides[index]
        entry = self.entries[index]
        with reading(entry.path, entry.slide_id):
            slide = prepare_slide(entry.path, self.artifacts, self.image)
        if self.shuffle_pairs:
            slide = shuffled_pairs(slide, seed=index)
        self._slides[index] = slide
        while len(self._slides) > self.cache:
            self._slides.popitem(last=False)
        return slide

    def sample(self, hops: int, slides: int = 4, spots: int = 128) -> SlideBatch:
        """Counts of the first spots, which lie side by side, of slides spread over the data set.

        Args:
            hops: of halo round them.
            slides: at most so many.
            spots: of each at most so many.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, slides).astype(np.int64))
        parts = []
        for index in chosen.tolist():
            slide = dataclasses.replace(
                self[index], features_SF=None, use_patches=False, stain_6=None
            )
            core = np.arange(min(spots, slide.n_spots))
            parts.append((slide, np.zeros((1, slide.n_spots), dtype=np.int64), core))
        return collate(parts, hops)


def shuffled_pairs(slide: PreparedSlide, seed: int) -> PreparedSlide:
    """The slide with its image features permuted over its spots.

    Raises:
        ConfigError: the slide is read as patches; the control exists for stored features.
    """
    if slide.use_patches:
        raise ConfigError("data.shuffle_pairs needs stored features; set data.image to a key")
    if slide.features_SF is None:
        return slide
    order = np.random.default_rng([seed, slide.n_spots]).permutation(slide.n_spots)
    return dataclasses.replace(slide, features_SF=slide.features_SF[order])


def slide_of_anndata(
    adata: Any, artifacts: Artifacts, spatial: str | None = None, layer: str = ""
) -> PreparedSlide:
    """One slide from AnnData: raw counts, gene names in var_names, micrometres in obsm.

    The counts are the layer named, else X, else layers['counts'] (said by a warning). A backed
    object is read; float16 and other byte orders are taken as they are.

    The micrometres are ``obsm[spatial]``; when None, ``spatial_um`` (as HiBio writes them) where
    there is one, else ``spatial``. Where the model was trained on intensities (proteins), X holds
    intensities of at least 0.

    Raises:
        ConfigError: no coordinates, or values that are not what the model was trained on.
    """
    if spatial is None:
        spatial = OBSM_UM if OBSM_UM in adata.obsm else OBSM_SPATIAL
    if spatial not in adata.obsm:
        raise ConfigError(
            f"adata.obsm has no {spatial!r} (it has: {', '.join(adata.obsm) or 'nothing'}); put "
            "the spot centres in micrometres there, or name their key (spatial=...)"
        )
    counts = _counts_of(adata, layer, artifacts.modality)
    total = even_total(counts) if artifacts.modality == RNA else None
    if total is not None:
        warnings.warn(
            f"all spots of adata have a total of about {total:,.0f}, which counts hardly have: "
            "give the raw counts, if these are normalised values that were rounded",
            stacklevel=3,
        )
    names = np.asarray(adata.var_names, dtype=str)
    if len({*names}) < len(names):
        raise ConfigError("adata.var_names holds a gene twice; call adata.var_names_make_unique()")
    places = adata.obsm[spatial]
    named = isinstance(places, pd.DataFrame) and places.shape[1] >= 2
    xy_um = frame_xy(places) if named else np.asarray(places, dtype=np.float64)[:, :2]
    if not np.isfinite(xy_um).all():
        bad = int((~np.isfinite(xy_um)).any(axis=1).sum())
        raise ConfigError(f"adata.obsm[{spatial!r}]: {bad} spots have no finite coordinates")
    if len(xy_um) > 1 and np.ptp(xy_um, axis=0).max() == 0:
        raise ConfigError(
            f"adata.obsm[{spatial!r}]: all {len(xy_um)} spots lie at one place; put the spot "
            "centres in micrometres there"
        )
    _require_one_section(adata, xy_um)
    _check_unit(adata, xy_um, spatial)
    panel = PanelMap.between(names, artifacts.genes, n_folded_in=artifacts.n_folded_in)
    return expression_slide(
        ArrayCounts(panel.align(counts)),
        xy_um,
        artifacts,
        slide_id="anndata",
        matched=panel.matched,
        measured=panel.measured,
        folded_in=panel.folded_in,
    )


def _require_one_section(adata: Any, xy_um: np.ndarray) -> None:
    barcodes = np.asarray(adata.obs_names, dtype=object)
    columns = adata.obs.reset_index(drop=True)
    libraries = adata.uns.get("spatial", {})
    libraries = tuple(libraries) if isinstance(libraries, Mapping) else ()
    found = several_sections(xy_um, columns, barcodes, libraries)
    if found is None:
        return
    first = next(iter(found.sizes), "")
    which = f"adata.obs[{found.column!r}].astype(str) == {first!r}"
    if found.column == SUFFIX:
        which = f"adata.obs_names.str.endswith('-{first}')"
    fix = f"encode one at a time: adata[{which}]" if found.column else "give one section"
    raise ConfigError(f"adata: {found}; {fix}")


def _counts_of(adata: Any, layer: str, modality: str) -> sparse.csr_matrix:
    """Raw values (S, G): of the layer, or X, or layers['counts'] where X has none."""
    named = ", ".join(name for name in adata.layers if name) or "nothing"  # None is X: anndata 0.13
    if layer and layer not in adata.layers:
        raise ConfigError(f"adata.layers has no {layer!r} (it has: {named})")
    if layer:
        matrix, where = adata.layers[layer], f"adata.layers[{layer!r}]"
    else:
        matrix, where = adata.X, "adata.X"
    counts = None if matrix is None else _native_csr(matrix)
    wrong = "is empty" if counts is None else _wrong_values(counts.data, modality)
    if not wrong:
        assert counts is not None
        return counts
    if not layer and _COUNTS in adata.layers:
        warnings.warn(
            f"{where} {wrong}: adata.layers[{_COUNTS!r}] taken; layer=... says which",
            stacklevel=4,
        )
        return _counts_of(adata, _COUNTS, modality)
    raise ConfigError(
        f"{where} {wrong}; give the raw counts there, or name the layer that holds them "
        f"(layer=...; adata.layers has: {named})"
    )


def _native_csr(matrix: Any) -> sparse.csr_matrix:
    """A matrix of AnnData, also one that lies in a file, as scipy takes it."""
    if not sparse.issparse(matrix) and not isinstance(matrix, np.ndarray):
        matrix = matrix.to_memory() if hasattr(matrix, "to_memory") else np.asarray(matrix[:])
    if sparse.issparse(matrix):
        matrix = matrix.copy()
        matrix.data = native_numbers(matrix.data)
        return sparse.csr_matrix(matrix)
    return sparse.csr_matrix(native_numbers(np.asarray(matrix)))


def _wrong_values(values: np.ndarray, modality: str) -> str:
    if not np.isfinite(values).all() or (len(values) and values.min() < 0):
        return "holds negative or non-finite values"
    if modality == "rna" and np.any(values != np.rint(values)):
        return "holds values that are not raw counts"
    return ""


def _check_unit(adata: Any, xy_um: np.ndarray, spatial: str) -> None:
    """Refuse places that are pixels or millimetres, as the lattice or near neighbours tell it.

    Neighbours of a hexagonal Visium array are 100 um apart; without an array the nearest neighbours
    of spots and cells lie in the range that stores are held to.
    """
    key = f"adata.obsm[{spatial!r}]"
    if {"array_row", "array_col"} <= set(adata.obs.columns):
        array = np.asarray(adata.obs[["array_row", "array_col"]], dtype=np.float64)
        whole = np.isfinite(array).all() and (array == np.rint(array)).all()
        if whole and len(np.unique(array, axis=0)) == len(array):
            pitch = hex_pitch_px(array.astype(np.int64), xy_um)
            if pitch is not None and abs(pitch / VISIUM_PITCH_UM - 1) > _UNIT_TOLERANCE:
                raise ConfigError(
                    f"{key} are not micrometres: neighbours of the Visium array are {pitch:.4g} "
                    f"apart, not 100 um; multiply by {VISIUM_PITCH_UM / pitch:.6g}"
                )
            return
    near = spacing_um(xy_um)
    if near is not None and not SPACING_UM[0] <= near <= SPACING_UM[1]:
        unit = "millimetres (multiply by 1000)" if near < 1 else "pixels (multiply by um per pixel)"
        raise ConfigError(
            f"{key} are not micrometres: the nearest neighbour of a spot is {near:.3g} away "
            f"(median); they look like {unit}"
        )


def image_batch(
    image: np.ndarray,
    artifacts: Artifacts,
    context: np.ndarray | None = None,
    stain: StainMethod = "none",
) -> SlideBatch:
    """A batch with image input only.

    Args:
        image: features (S, F), or uint8 patches (S, h, w, 3), of one slide.
        artifacts: of the model.
        context: the wider patches of the same spots, uint8 (S, h, w, 3), for a model that reads
            them.
        stain: bring the patches to one stain, as measured on those given.

    Raises:
        ConfigError: context or stain with features, or an image that is neither of the two, empty
            or not finite.
        DataError: too few stained pixels to measure the stain.
    """
    image = np.asarray(image)
    _require_image(image)
    n_spots = len(image)
    k = artifacts.settings.genes.keyword_genes
    visual: dict[str, torch.Tensor] = {}
    if image.ndim == 4:
        normaliser = stain_normaliser(stain, image)
        patches = normaliser(image)
        visual["patches_SCHW"] = _channels_first(patches)
        visual["stain_S6"] = torch.from_numpy(np.tile(colour_statistics(patches), (n_spots, 1)))
        if context is not None:
            visual["context_SCHW"] = _channels_first(normaliser(context))
    else:
        if context is not None or stain != "none":
            raise ConfigError("context and stain are for patches (S, h, w, 3), not for features")
        visual["features_SF"] = torch.from_numpy(standardise_columns(image))
    slide_S = torch.zeros(n_spots, dtype=torch.long)
    return lone_spots(
        torch.full((n_spots, k), artifacts.n_genes),
        torch.zeros(n_spots, k),
        torch.zeros(n_spots, artifacts.factors.components.shape[1]),
        slide_S,
        slide_of_spot_S=slide_S,
        slide_ids=("image",),
        stain=stain,
        **visual,
    )


def _require_image(image: np.ndarray) -> None:
    """Refuse what a slide is standardised by and is no number: one such spot would spoil all."""
    shape, kind = image.shape, image.dtype
    patches = len(shape) == 4 and shape[3] == 3 and kind == np.uint8
    if (not patches and (len(shape) != 2 or kind.kind not in "iuf")) or not shape[0]:
        raise ConfigError(
            f"the image is {kind} {shape}; expected the spots of one slide, as stored features "
            "(S, F) or uint8 patches (S, h, w, 3)"
        )
    bad = 0 if patches else int((~np.isfinite(image)).any(axis=1).sum())
    if bad:
        raise ConfigError(
            f"features of {bad} of {shape[0]} spots are not finite; leave these spots out or "
            "compute their features again"
        )


def warn_of_one(image: np.ndarray) -> None:
    """Tell that the features of one spot, standardised over itself, are 0 whatever they were."""
    if np.ndim(image) == 2 and len(image) == 1:
        warnings.warn(
            "the features of one spot, standardised over itself, say nothing: any spot gives this "
            "result; give all spots of its slide",
            stacklevel=3,
        )


def _channels_first(patches: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(patches, 3, 1)))
