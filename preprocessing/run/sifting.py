"""What a store will hold of one slide: its spots read, placed and sifted (docs/method.md 0).

`prepare` writes it, `hibio check` tells it; nothing is written here. Spots that carry nothing are
left out, and counted. Shapes: S spots.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from preprocessing.errors import DataError
from preprocessing.findings import SlideWarning
from preprocessing.gene_ids import GeneMapConfig, apply_gene_map
from preprocessing.patches import PatchConfig, iter_patches
from preprocessing.pseudo_spots import beyond_picture
from preprocessing.readers.format import (
    format_of,
    read_slide_spots,
    read_spots,
    source_files,
    warned,
)
from preprocessing.registration import register
from preprocessing.slide_row import SlideRow
from preprocessing.slides import Slide, open_slide
from preprocessing.slides.decoders import direct_tiles
from preprocessing.slides.kept import kept_picture
from preprocessing.slides.ome_zarr import is_zarr
from preprocessing.spot_table import PROTEIN, SpotTable, hilbert_order
from preprocessing.store import SlidePicture
from preprocessing.tissue import has_black_background, thumbnail, tissue_fraction, tissue_mask

ZERO_COUNTS = "zero counts"
BLACK_AS_WHITE = "black background read as white"  # a note of a store
NO_SIGNAL = "all intensities are zero"
OFF_TISSUE = "off tissue"
MANY = 0.1  # part of the spots; where more are left out for one reason, a slide is warned of
_BEYOND = "centre beyond the edge of the picture"
Images = Literal["jpeg", "raw"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class QualityConfig:
    """Limits for leaving out spots.

    Attributes:
        min_tissue: smallest part of the patch that must be tissue, 0..1 (only with an image).
        max_dropped: largest part of the spots that may be left out as off tissue; more means that
            the coordinates do not fit the image, or that the image is no stained section.
    """

    min_tissue: float = 0.05
    max_dropped: float = 0.5


@dataclass(frozen=True)
class SlideTask:
    """One slide to prepare: its row, the file to write, and what `prepare` was told."""

    row: SlideRow
    store: Path
    patch: PatchConfig
    images: Images = "jpeg"
    quality: QualityConfig = field(default_factory=QualityConfig)
    genes: GeneMapConfig | None = None
    backend: str = "auto"
    fix_registration: bool = False


def drop_reasons(
    table: SpotTable, tissue_fraction: np.ndarray | None = None, config: QualityConfig | None = None
) -> dict[str, np.ndarray]:
    """Find the spots that carry no information: nothing counted (or measured), or off tissue.

    No depth is asked of them: a cell with few counts is kept, and the sum of intensities depends
    on exposure and antibodies, not on how well a cell was measured.

    Args:
        table: the spots of one slide.
        tissue_fraction: (S,) part of each patch that is tissue; None without image.
        config: the limits.

    Returns:
        Reason -> (S,) bool, True: leave out. A spot counts under its first reason only.
    """
    config = config or QualityConfig()
    empty = np.zeros(table.n_spots, dtype=bool)
    if not table.image_only:
        empty = np.asarray(table.counts.sum(axis=1)).ravel() == 0
    reasons = {NO_SIGNAL if table.modality == PROTEIN else ZERO_COUNTS: empty}
    if tissue_fraction is not None:
        reasons[OFF_TISSUE] = (tissue_fraction < config.min_tissue) & ~empty
    return reasons


def drop_mask(
    table: SpotTable, tissue_fraction: np.ndarray | None = None, config: QualityConfig | None = None
) -> np.ndarray:
    """Return the (S,) bool mask of the spots to leave out, for any reason of `drop_reasons`.

    Raises:
        DataError: no spot would stay, or more than ``max_dropped`` of them are off tissue.
    """
    config = config or QualityConfig()
    reasons = drop_reasons(table, tissue_fraction, config)
    mask = np.logical_or.reduce(list(reasons.values()))
    found = ", ".join(f"{int(v.sum())} {k}" for k, v in reasons.items())
    off_tissue = reasons.get(OFF_TISSUE, np.zeros(table.n_spots, dtype=bool))
    if off_tissue.mean() > config.max_dropped:
        raise DataError(
            f"{int(off_tissue.sum())} of {table.n_spots} spots are off tissue (less than "
            f"{config.min_tissue:.0%} of the patch is stained); the coordinates do not fit the "
            "image (look at image_scale and mpp), or it is no stained section: then leave the "
            "column image empty for a counts-only store"
        )
    if mask.all():
        raise DataError(f"no spot of {table.n_spots} is left ({found}); check counts and positions")
    return np.asarray(mask, dtype=bool)


@dataclass(frozen=True)
class Sifted:
    """The spots of one slide, and what was found about them.

    Attributes:
        table: the spots that stay, along a Hilbert curve.
        placed: the spots within the picture, before those that carry nothing were left out.
        patch: the patches, as wide as the array where nobody says more.
        dropped: reason -> how many spots were left out for it.
        tissue_fraction: (S,) of the spots that stay; None without image.
        picture: the slide as a whole; None without image.
    """

    table: SpotTable
    placed: SpotTable
    patch: PatchConfig
    dropped: dict[str, int]
    tissue_fraction: np.ndarray | None = None
    picture: SlidePicture | None = None


def left_out(dropped: Mapping[str, int]) -> list[str]:
    """A sentence for each reason for which spots were left out."""
    return [f"{number} spots left out: {reason}" for reason, number in dropped.items()]


def sources(row: SlideRow) -> dict[str, Path]:
    """The files that a store is made from, by role.

    Raises:
        DataError: one is missing, or no file.
    """
    found = source_files(row)
    for role, path in found.items():
        if not path.is_file() and not is_zarr(path):
            kind = "a folder" if path.is_dir() else "not an ordinary file"
            raise DataError(f"{role} {path} is {kind}; give a file")
    return found


@contextmanager
def sifted(
    task: SlideTask, warnings: tuple[SlideWarning, ...] = ()
) -> Iterator[tuple[Slide | None, Sifted]]:
    """The open slide of a row whose image is settled (None: it has none), and its spots.

    ``warnings`` are added to those of the spots.

    Raises:
        DataError: the sources cannot be used; names the file and the remedy.
    """
    if task.row.image is None:
        table = read_spots(task.row)
        yield (
            None,
            _sift(task, None, warned(table, [*warnings]), task.patch.on_array(table.pitch_um)),
        )
        return
    with open_row_slide(task.row, task.backend) as (slide, notes):
        table, patch = read_slide_spots(task.row, slide, task.patch)
        table = warned(replace(table, notes=table.notes + notes), [*warnings])
        yield slide, _sift(task, slide, table, patch)


def _sift(task: SlideTask, slide: Slide | None, table: SpotTable, patch: PatchConfig) -> Sifted:
    if task.genes is not None:
        table = apply_gene_map(table, task.genes, task.row.organism)
    beyond, fraction, picture = 0, None, None
    if slide is not None:
        picture = slide_picture(slide)
        table, picture = _registered(task, picture, table)
        with likely_place(picture, table):
            table, beyond = inside_picture(task.row, slide, table, task.quality.max_dropped)
            fraction = _tissue(slide, table, patch)
            drop_mask(table, fraction, task.quality)
    reasons = drop_reasons(table, fraction, task.quality)
    kept = np.flatnonzero(~drop_mask(table, fraction, task.quality))
    off_tissue = reasons.get(OFF_TISSUE, np.zeros(table.n_spots, dtype=bool))
    if picture is not None:
        picture = replace(picture, left_out_px0=table.xy_px0[off_tissue])
    table = warned(table, _many_left_out(reasons))
    order = kept[hilbert_order(table.xy_um[kept])]
    counted = {reason: int(mask.sum()) for reason, mask in reasons.items()} | {_BEYOND: beyond}
    dropped = {reason: number for reason, number in counted.items() if number}
    fraction = None if fraction is None else fraction[order]
    return Sifted(table.take(order), table, patch, dropped, fraction, picture)


def with_picture(row: SlideRow, read: Callable[[SlideRow, tuple[SlideWarning, ...]], _T]) -> _T:
    """What ``read`` makes of a row whose image is settled, and of what is to be warned of.

    The picture that an AnnData file keeps is a last resort: where it does not fit, the row has no
    image.
    """
    used = with_kept_picture(row)
    if row.image is not None or used.image is None:
        return read(used, ())
    kept = kept_picture(used.image)
    told = "" if kept is None else "{} ({} x {} pixels)".format(kept.name, *kept.size)
    fix = "name the slide itself in the column image if there is one"
    found = f"the column image is empty: read is the small picture {told} of uns['spatial']"
    try:
        return read(used, (SlideWarning(found, fix),))
    except DataError as error:
        unused = f"no image; the picture {told} of uns['spatial'] is not used: {error}"
        return read(row, (SlideWarning(unused, fix),))


def with_kept_picture(row: SlideRow) -> SlideRow:
    """The row with the picture that its AnnData file keeps, where no other image is named.

    Also where the column image names an .h5ad: its scale factor becomes ``image_scale``. The mpp
    of a row without image, um per coordinate unit, becomes that of the picture.
    """
    path = row.counts if row.image is None and row.format == "h5ad" else row.image
    kept = kept_picture(path) if path is not None and path.suffix == ".h5ad" else None
    if kept is None:
        return row
    scale = kept.scale if row.image_scale is None else row.image_scale
    mpp = row.mpp / kept.scale if row.image is None and row.mpp is not None else row.mpp
    return replace(row, image=path, image_scale=scale, mpp=mpp)


@contextmanager
def open_row_slide(row: SlideRow, backend: str = "auto") -> Iterator[tuple[Slide, tuple[str, ...]]]:
    """Open the image of a row; a background painted black is read as white, which is noted."""
    if row.image is None:
        raise DataError(f"slide {row.slide_id} has no image; fill the manifest column image")
    with _opened(row.image, False, backend) as slide:
        if not has_black_background(slide):
            yield slide, slide.notes
            return
    with _opened(row.image, True, backend) as slide:
        yield slide, (*slide.notes, BLACK_AS_WHITE)


def _opened(path: Path, black_is_background: bool, backend: str) -> Slide:
    slide = open_slide(path, black_is_background, backend)
    return direct_tiles(slide, black_is_background) if backend == "auto" else slide


def _many_left_out(reasons: Mapping[str, np.ndarray]) -> list[SlideWarning]:
    """A warning for each reason (S,) that takes many spots, though not too many."""
    fix = "see by `hibio check` and `hibio qc` whether image and counts are of these spots"
    return [
        SlideWarning(f"{int(mask.sum())} of {len(mask)} spots are left out: {reason}", fix)
        for reason, mask in reasons.items()
        if mask.mean() > MANY
    ]


def _registered(
    task: SlideTask, picture: SlidePicture, table: SpotTable
) -> tuple[SpotTable, SlidePicture]:
    """The spots where the picture shows them, if that was asked for and they do not lie there."""
    if not task.fix_registration or table.image_only:
        return table, picture
    found = register(picture, table.xy_px0, table.counts, table.image_transform)
    if found.matrix is None:
        return table, picture
    table = table.transformed(found.matrix, f"--fix-registration (as {found.correction})")
    return table, replace(picture, correction=found.correction)


@contextmanager
def likely_place(picture: SlidePicture, table: SpotTable) -> Iterator[None]:
    """Say in an error about spots beyond the picture or its tissue where they fit."""
    try:
        yield
    except DataError as error:
        if table.image_only:
            raise
        found = register(picture, table.xy_px0, table.counts, table.image_transform)
        if not found.correction:
            raise
        raise DataError(f"{error}. {found.message}: {found.fix}") from error


def inside_picture(
    row: SlideRow, slide: Slide, table: SpotTable, most: float = QualityConfig.max_dropped
) -> tuple[SpotTable, int]:
    """The table without the spots centred beyond the edge of the picture, and their number.

    A square of pseudo-spots at the edge may reach beyond it; of others the table warns. Where more
    than the part ``most`` of the spots lies beyond, the coordinates are those of another picture:
    then nothing is left out, and reading the patches says so.
    """
    size = np.asarray(slide.level_dimensions[0])
    beyond = ((table.xy_px0 < 0) | (table.xy_px0 > size)).any(axis=1)
    if not beyond.any() or beyond.mean() > most:
        return table, 0
    cropped = beyond
    if row.pitch_um is not None and format_of(row.format).cells:
        cropped = beyond & ~beyond_picture(table, row.pitch_um, (int(size[0]), int(size[1])))
    found = f"{int(cropped.sum())} of {table.n_spots} spots are left out: {_BEYOND} of {size[0]} x "
    found += f"{size[1]} pixels"
    fix = "look whether the image was cropped or is another's, and at image_scale"
    warnings = [SlideWarning(found, fix)] if cropped.any() else []
    return warned(table.take(np.flatnonzero(~beyond)), warnings), int(beyond.sum())


def _tissue(slide: Slide, table: SpotTable, patch: PatchConfig) -> np.ndarray:
    """Part of each patch that is tissue, (S,); raises DataError for spots outside the image."""
    patches_of(slide, table, patch)
    if table.tissue_fraction is not None:
        return table.tissue_fraction
    return tissue_fraction(tissue_mask(slide), table.xy_px0, patch.um, table.mpp)


def slide_picture(slide: Slide) -> SlidePicture:
    """The slide as a whole: a thumbnail of at most 1024 pixels."""
    small, downsample = thumbnail(slide)
    width, height = slide.level_dimensions[0]
    return SlidePicture((int(width), int(height)), small, downsample)


def patches_of(
    slide: Slide, table: SpotTable, patch: PatchConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels of each spot's patch; raises DataError for spots outside the image."""
    names = [str(name) for name in table.barcodes]
    return iter_patches(slide, table.xy_px0, table.mpp, patch.um, patch.patch_px, names)
