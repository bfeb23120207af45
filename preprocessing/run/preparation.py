"""One slide from its source files to its store (docs/method.md 0).

Spots that carry nothing are left out; the store says how many and why. Shapes: S spots.
"""

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocessing.errors import DataError
from preprocessing.findings import SlideWarning
from preprocessing.gene_ids import GeneMapConfig, apply_gene_map
from preprocessing.handcrafted import handcrafted_batch
from preprocessing.manifest import missing_files
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
from preprocessing.slide_row import PATH_COLUMNS, SAID, SlideRow
from preprocessing.slides import Slide, open_slide
from preprocessing.slides.decoders import direct_tiles
from preprocessing.slides.kept import kept_picture
from preprocessing.slides.ome_zarr import is_zarr
from preprocessing.spot_table import PROTEIN, SpotTable, hilbert_order
from preprocessing.store import SlidePicture, SlideStore, file_sha256, say_anew, write_store
from preprocessing.tissue import has_black_background, thumbnail, tissue_fraction, tissue_mask

ZERO_COUNTS = "zero counts"
NO_SIGNAL = "all intensities are zero"
OFF_TISSUE = "off tissue"
MUCH_OFF_TISSUE = 0.1  # part of the spots, from which a slide is warned of
HANDCRAFTED = "handcrafted"
_BEYOND = "centre beyond the edge of the picture"
_RECIPE = 2  # raise it when the same sources would give another store
_FEATURE_PX = 64
_CONTEXT = 3.0
_BATCH = 64
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Status = Literal["done", "skipped", "failed"]
Images = Literal["jpeg", "raw"]


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


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide.

    Attributes:
        status: "done", "skipped" (the store is up to date) or "failed".
        reason: why it failed or was skipped, or what was left out.
        n_spots: spots in the store; 0 if failed.
        patch_um: width of the patches; 0 if failed or without an image.
        seconds: time spent.
    """

    slide_id: str
    status: Status
    reason: str = ""
    n_spots: int = 0
    patch_um: float = 0.0
    seconds: float = 0.0


def attempt_slide(task: SlideTask) -> SlideResult:
    """Prepare one slide and turn whatever goes wrong into a result; then there is no new store."""
    begin = time.monotonic()
    result = SlideResult(task.row.slide_id, "failed")
    try:
        result = prepare_slide(task)
    except DataError as error:
        result = replace(result, reason=str(error))
    except MemoryError:
        reason = "not enough memory for this slide; are its files what the manifest says?"
        result = replace(result, reason=reason)
    except Exception as error:  # noqa: BLE001 - one bad slide must never stop the others
        result = replace(result, reason=_reason(error, task.store.parent))
    reason = " ".join(result.reason.split())
    return replace(result, reason=reason, seconds=time.monotonic() - begin)


def _reason(error: Exception, folder: Path) -> str:
    if _disk_full(error):
        free = shutil.disk_usage(folder).free / 2**20
        return (
            f"the disk is full or the store exceeds a limit: {free:,.0f} MiB are free in {folder}; "
            "make room, or choose another --out, and run again: finished slides are kept"
        )
    if isinstance(error, OSError):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}"


def _disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that nothing more can be written.

    HDF5 gives the code of the system in its message only.
    """
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        if any(f"errno = {code}," in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def prepare_slide(task: SlideTask) -> SlideResult:
    """Write the store of one slide, unless it is there with the same sources and settings.

    Spots without counts, and with an image those off tissue, are left out; their numbers are
    written into the attribute "dropped". The others are put along a Hilbert curve.

    Raises:
        DataError: the sources cannot be used; names the file and the remedy.
    """
    problems = missing_files(task.row)
    if problems:
        raise DataError("; ".join(problems))
    row = with_kept_picture(task.row)
    if task.row.image is not None or row.image is None:
        return _prepared(replace(task, row=row))
    kept = kept_picture(row.image)
    told = "" if kept is None else "{} ({} x {} pixels)".format(kept.name, *kept.size)
    fix = "name the slide itself in the column image if there is one"
    used = f"the column image is empty: read is the small picture {told} of uns['spatial']"
    try:
        return _prepared(replace(task, row=row), (SlideWarning(used, fix),))
    except DataError as error:
        unused = f"no image; the picture {told} of uns['spatial'] is not used: {error}"
        return _prepared(task, (SlideWarning(unused, fix),))


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


def _prepared(task: SlideTask, warnings: tuple[SlideWarning, ...] = ()) -> SlideResult:
    """The store of a slide whose image is settled; ``warnings`` go into it."""
    row = task.row
    hashes = {role: _hash(role, path) for role, path in sorted(source_files(row).items())}
    settings = _settings(task) | ({"kept_picture": row.image is not None} if warnings else {})
    known = _current_spots(task.store, hashes, settings)
    if known is not None:
        return _said(task, settings, known)
    if row.image is None:
        table = read_spots(row)
        table = replace(table, warnings=(*table.warnings, *warnings))
        patch = task.patch.on_array(table.pitch_um)
        return _write(replace(task, patch=patch), None, table, hashes, settings)
    with open_row_slide(row, task.backend) as (slide, notes):
        table, patch = read_slide_spots(row, slide, task.patch)
        table = replace(table, notes=table.notes + notes, warnings=(*table.warnings, *warnings))
        return _write(replace(task, patch=patch), slide, table, hashes, settings)


def _hash(role: str, path: Path) -> str:
    if not path.is_file() and not is_zarr(path):
        found = "a folder" if path.is_dir() else "not an ordinary file"
        raise DataError(f"{role} {path} is {found}; give a file")
    return file_sha256(path)


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
        yield slide, (*slide.notes, "black background read as white")


def _opened(path: Path, black_is_background: bool, backend: str) -> Slide:
    slide = open_slide(path, black_is_background, backend)
    return direct_tiles(slide, black_is_background) if backend == "auto" else slide


def _settings(task: SlideTask) -> dict[str, Any]:
    """Return everything but the file contents that the store depends on, as plain JSON values."""
    fields = {k: v for k, v in asdict(task.row).items() if k not in PATH_COLUMNS}
    if not fields["image_transform"] or isinstance(fields["image_transform"], Path):
        del fields["image_transform"]  # the file is among the sources
    for name in {"layer", "section"} - {name for name in fields if fields[name]}:
        del fields[name]  # as in the stores of an older HiBio
    genes = task.genes
    named = {} if genes is None else {"sha256": file_sha256(genes.table), "target": genes.target}
    backend = {} if task.backend == "auto" else {"backend": task.backend}
    asked = {"fix_registration": True} if task.fix_registration else {}
    return (
        backend
        | asked
        | {
            "recipe": _RECIPE,
            "genes": named,
            "row": fields,
            "image_name": "" if task.row.image is None else task.row.image.name,
            "patch": {k: v for k, v in asdict(task.patch).items() if v is not None},
            "images": task.images,
            "quality": asdict(task.quality),
        }
    )


def _said(task: SlideTask, settings: dict[str, Any], n_spots: int) -> SlideResult:
    """Take over what the manifest says anew of a slide whose store is up to date otherwise."""
    said = {name: getattr(task.row, name) for name in SAID}
    with SlideStore(task.store) as store:
        changed = [name for name in SAID if said[name] != getattr(store, name)]
        um = float(store.attrs["patch_um"]) if store.has_image else 0.0
        warned = "".join(f"; {warning}" for warning in store.warnings)
    if not changed:
        reason = f"same sources and settings{warned}"
        return SlideResult(task.row.slide_id, "skipped", reason, n_spots, um)
    say_anew(task.store, said, settings)
    told = ", ".join(f"{name} is now {said[name]!r}" for name in changed)
    return SlideResult(task.row.slide_id, "done", f"same content; {told}{warned}", n_spots, um)


def _without_said(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the content."""
    row = {name: value for name, value in settings["row"].items() if name not in SAID}
    return {**settings, "row": row}


def _current_spots(store: Path, hashes: dict[str, str], settings: dict[str, Any]) -> int | None:
    """Return the number of spots of a store that is up to date, else None."""
    if not store.is_file():
        return None
    wanted = _without_said(json.loads(json.dumps(settings)))
    try:
        with SlideStore(store) as old:
            same = (old.attrs["source_sha256"], _without_said(old.attrs["settings"]))
            return old.n_spots if same == (hashes, wanted) else None
    except Exception:  # noqa: BLE001 - another schema, or damaged in any way: it is written anew
        return None


def _write(
    task: SlideTask,
    slide: Slide | None,
    table: SpotTable,
    hashes: dict[str, str],
    settings: dict[str, Any],
) -> SlideResult:
    if task.genes is not None:
        table = apply_gene_map(table, task.genes, task.row.organism)
    beyond, fraction, picture = 0, None, None
    if slide is not None:
        picture = slide_picture(slide)
        table, picture = _registered(task, picture, table)
        with likely_place(picture, table):
            table, beyond = inside_picture(task.row, slide, table, task.quality.max_dropped)
            fraction = _tissue(slide, table, task.patch)
            drop_mask(table, fraction, task.quality)
    reasons = drop_reasons(table, fraction, task.quality)
    kept = np.flatnonzero(~drop_mask(table, fraction, task.quality))
    off_tissue = reasons.get(OFF_TISSUE, np.zeros(table.n_spots, dtype=bool))
    left_out = table.xy_px0[off_tissue]
    table = warned(table, _much_off_tissue(off_tissue))
    order = kept[hilbert_order(table.xy_um[kept])]
    table = table.take(order)
    counted = {reason: int(mask.sum()) for reason, mask in reasons.items()} | {_BEYOND: beyond}
    dropped = {reason: number for reason, number in counted.items() if number}
    of_image: dict[str, Any] = {"patches": None}
    if slide is not None and fraction is not None and picture is not None:
        patch, wide = task.patch, task.patch.context_um
        of_image = {
            "patches": _patches(slide, table, patch),
            "context": wide and _patches(slide, table, PatchConfig(wide, patch.patch_px)),
            "features": {HANDCRAFTED: _handcrafted(slide, table, patch)},
            "tissue_fraction": fraction[order],
            "picture": replace(picture, left_out_px0=left_out),
        }
    write_store(
        task.store,
        table,
        task.row,
        patch=task.patch,
        source_sha256=hashes,
        encoding=task.images,
        settings=settings,
        dropped=dropped,
        **of_image,
    )
    told = [f"{n} spots left out: {reason}" for reason, n in dropped.items()]
    told += map(str, table.warnings)
    told += [f"places corrected by {picture.correction}"] if picture and picture.correction else []
    um = 0.0 if slide is None else task.patch.um
    return SlideResult(task.row.slide_id, "done", "; ".join(told), table.n_spots, um)


def _much_off_tissue(off_tissue: np.ndarray) -> list[SlideWarning]:
    """A warning where many spots (S,) are off tissue, though not too many."""
    if off_tissue.mean() <= MUCH_OFF_TISSUE:
        return []
    found = f"{int(off_tissue.sum())} of {len(off_tissue)} spots are off tissue; they are left out"
    return [SlideWarning(found, "see by `hibio check` and `hibio qc` whether the image fits")]


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
    found = f"{int(cropped.sum())} of {table.n_spots} spots lie beyond the edge of the image of "
    found += f"{size[0]} x {size[1]} pixels; they are left out"
    fix = "look whether the image was cropped or is another's, and at image_scale"
    warnings = [SlideWarning(found, fix)] if cropped.any() else []
    return warned(table.take(np.flatnonzero(~beyond)), warnings), int(beyond.sum())


def _tissue(slide: Slide, table: SpotTable, patch: PatchConfig) -> np.ndarray:
    """Part of each patch that is tissue, (S,); raises DataError for spots outside the image."""
    _patches(slide, table, patch)
    mask = tissue_mask(slide)
    return tissue_fraction(mask, table.xy_px0, patch.um, table.mpp)


def _patches(
    slide: Slide, table: SpotTable, patch: PatchConfig
) -> Iterator[tuple[int, np.ndarray]]:
    names = [str(name) for name in table.barcodes]
    return iter_patches(slide, table.xy_px0, table.mpp, patch.um, patch.patch_px, names)


def _handcrafted(slide: Slide, table: SpotTable, patch: PatchConfig) -> np.ndarray:
    """Features of the patch and of its context three times as wide, (S, 2F) float32."""
    scales = (patch.um, _CONTEXT * patch.um)
    return np.concatenate(
        [_scale_features(slide, table, PatchConfig(um, _FEATURE_PX)) for um in scales], axis=1
    )


def _scale_features(slide: Slide, table: SpotTable, patch: PatchConfig) -> np.ndarray:
    """Features of all patches of one size, (S, F) float32; `_BATCH` patches in memory."""
    order: list[int] = []
    blocks: list[np.ndarray] = []
    found = _patches(slide, table, patch)
    while batch := list(islice(found, _BATCH)):
        order += [spot for spot, _ in batch]
        blocks.append(handcrafted_batch(np.stack([pixels for _, pixels in batch])))
    features = np.concatenate(blocks)
    result = np.empty_like(features)
    result[order] = features
    return result


def slide_picture(slide: Slide) -> SlidePicture:
    """The slide as a whole: a thumbnail of at most 1024 pixels."""
    small, downsample = thumbnail(slide)
    width, height = slide.level_dimensions[0]
    return SlidePicture((int(width), int(height)), small, downsample)
