"""One slide from its source files to its store (docs/method.md 0). Shapes: S spots."""

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from preprocessing.errors import DataError
from preprocessing.files import FULL
from preprocessing.findings import SlideWarning
from preprocessing.handcrafted import FEATURE_NAMES, handcrafted_batch
from preprocessing.manifest import missing_files
from preprocessing.patches import PatchConfig
from preprocessing.run.sifting import (
    Sifted,
    SlideTask,
    left_out,
    patches_of,
    sifted,
    sources,
    with_picture,
)
from preprocessing.slide_row import PATH_COLUMNS, SAID
from preprocessing.slides import Slide
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlideStore, file_sha256, say_anew, write_store

HANDCRAFTED = "handcrafted"
_RECIPE = 2  # raise it when the same sources would give another store
_FEATURE_PX = 64
_CONTEXT = 3.0
_BATCH = 64
Status = Literal["done", "skipped", "failed"]


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
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in FULL:
            return True
        if any(f"errno = {code}," in str(error) for code in FULL):
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
    return with_picture(task.row, lambda row, told: _prepared(replace(task, row=row), told))


def _prepared(task: SlideTask, warnings: tuple[SlideWarning, ...]) -> SlideResult:
    """The store of a slide whose image is settled; ``warnings`` go into it."""
    hashes = {role: file_sha256(path) for role, path in sorted(sources(task.row).items())}
    kept = {"kept_picture": task.row.image is not None} if warnings else {}
    settings = _settings(task) | kept
    known = _current_spots(task.store, hashes, settings)
    if known is not None:
        return _said(task, settings, known)
    with sifted(task, warnings) as (slide, found):
        return _write(task, slide, found, hashes, settings)


def _settings(task: SlideTask) -> dict[str, Any]:
    """Return everything but the file contents that the store depends on, as plain JSON values."""
    fields = {k: v for k, v in asdict(task.row).items() if k not in PATH_COLUMNS}
    if not fields["image_transform"] or isinstance(fields["image_transform"], Path):
        del fields["image_transform"]  # the file is among the sources
    for name in {"layer", "section"} - {name for name in fields if fields[name]}:
        del fields[name]  # as in the stores of an older HiBio
    named = {} if task.genes is None else task.genes.settings()
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
        told = _told(store)
    if not changed:
        reason = "; ".join(["same sources and settings", *told])
        return SlideResult(task.row.slide_id, "skipped", reason, n_spots, um)
    say_anew(task.store, said, settings)
    news = ", ".join(f"{name} is now {said[name]!r}" for name in changed)
    reason = "; ".join([f"same content; {news}", *told])
    return SlideResult(task.row.slide_id, "done", reason, n_spots, um)


def _told(store: SlideStore) -> list[str]:
    """What to know of a slide: spots that were left out, warnings, notes of the reader."""
    warned = " ".join(warning.message for warning in store.warnings)
    dropped = store.attrs.get("dropped", {})
    small = {reason: number for reason, number in dropped.items() if reason not in warned}
    return [*left_out(small), *map(str, store.warnings), *store.attrs.get("notes", ())]


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
    found: Sifted,
    hashes: dict[str, str],
    settings: dict[str, Any],
) -> SlideResult:
    table, patch, picture = found.table, found.patch, found.picture
    of_image: dict[str, Any] = {"patches": None}
    if slide is not None:
        wide = patch.context_um
        of_image = {
            "patches": patches_of(slide, table, patch),
            "context": wide and patches_of(slide, table, PatchConfig(wide, patch.patch_px)),
            "features": {HANDCRAFTED: handcrafted_features(slide, table, patch)},
            "tissue_fraction": found.tissue_fraction,
            "picture": picture,
        }
    write_store(
        task.store,
        table,
        task.row,
        patch=patch,
        source_sha256=hashes,
        encoding=task.images,
        settings=settings,
        dropped=found.dropped,
        **of_image,
    )
    with SlideStore(task.store) as store:
        told = _told(store)
    told += [f"places corrected by {picture.correction}"] if picture and picture.correction else []
    um = 0.0 if slide is None else patch.um
    return SlideResult(task.row.slide_id, "done", "; ".join(told), table.n_spots, um)


def handcrafted_features(slide: Slide, table: SpotTable, patch: PatchConfig) -> np.ndarray:
    """Features of the patch and of its context three times as wide, (S, 2F) float32.

    `_BATCH` patches in memory.
    """
    n = len(FEATURE_NAMES)
    features = np.empty((table.n_spots, 2 * n), dtype=np.float32)
    for place, um in enumerate((patch.um, _CONTEXT * patch.um)):
        found = patches_of(slide, table, PatchConfig(um, _FEATURE_PX))
        while batch := list(islice(found, _BATCH)):
            rows = handcrafted_batch(np.stack([pixels for _, pixels in batch]))
            features[[spot for spot, _ in batch], place * n : (place + 1) * n] = rows
    return features
