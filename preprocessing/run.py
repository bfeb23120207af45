"""Manifest -> slide stores: one file a slide, resumable; one bad slide never stops the others."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.manifest import SlideRow, scan_manifest
from preprocessing.patches import PatchConfig
from preprocessing.preparation import Images, SlideTask, prepare_slide
from preprocessing.quality import QualityConfig
from preprocessing.store_layout import ENCODERS

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide.

    Attributes:
        slide_id: the slide.
        status: "done", "skipped" (the store is up to date) or "failed".
        reason: why it failed or was skipped, or what was left out.
        n_spots: spots in the store; 0 if failed.
        seconds: time spent.
    """

    slide_id: str
    status: Status
    reason: str = ""
    n_spots: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PrepareReport:
    """The results of `prepare`, in the order of the manifest."""

    rows: tuple[SlideResult, ...]

    @property
    def failed(self) -> tuple[SlideResult, ...]:
        """The slides that have no new store."""
        return tuple(row for row in self.rows if row.status == "failed")

    def __str__(self) -> str:
        """Return a table, one line a slide."""
        width = max([len("slide"), *(len(row.slide_id) for row in self.rows)])
        lines = [f"{'slide':<{width}}  status   {'spots':>7}  {'seconds':>7}  reason"]
        lines += [
            f"{r.slide_id:<{width}}  {r.status:<7}  {r.n_spots:>7}  {r.seconds:>7.1f}  {r.reason}"
            for r in self.rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def prepare(
    manifest: str | Path | Sequence[SlideRow],
    out: str | Path,
    root: str | Path | None = None,
    patch: PatchConfig | None = None,
    workers: int = 1,
    images: Images = "jpeg",
    quality: QualityConfig | None = None,
) -> PrepareReport:
    """Prepare every slide of a manifest: ``<out>/<slide_id>.h5``.

    A slide whose store was made from the same files with the same settings is skipped.

    Args:
        manifest: CSV file, or rows.
        out: folder of the stores; made when missing.
        root: folder that relative paths of the manifest start from; None: the manifest's own.
        patch: size of the patches; None: 112 um, 224 px.
        workers: processes; 1 works in this one.
        images: "jpeg" (quality 90) or "raw" patches.
        quality: limits for leaving out spots.

    Returns:
        One result a slide. Slides with missing or bad files are "failed" there.

    Raises:
        DataError: the manifest as a whole cannot be used, or an argument is out of range.
    """
    if workers < 1:
        raise DataError(f"workers is {workers}; expected 1 or more processes")
    if images not in ENCODERS:
        raise DataError(f"images is {images!r}; choose {' or '.join(ENCODERS)}")
    out = Path(out)
    rows = _rows(manifest, root)
    out.mkdir(parents=True, exist_ok=True)
    tasks = [
        SlideTask(
            row,
            out / f"{row.slide_id}.h5",
            patch or PatchConfig(),
            images,
            quality or QualityConfig(),
        )
        for row in rows
    ]
    results: dict[str, SlideResult] = {}
    with tqdm(total=len(tasks), desc="prepare", unit="slide", disable=None) as bar:
        for result in _results(tasks, min(workers, len(tasks))):
            results[result.slide_id] = result
            bar.update()
    return PrepareReport(tuple(results[row.slide_id] for row in rows))


def stores_in(folder: str | Path) -> list[Path]:
    """Return the stores (``*.h5``, without hidden files) of a folder, sorted by name.

    Raises:
        DataError: no such folder, or no store in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that `hibio prepare` wrote")
    found = sorted(p for p in folder.glob("*.h5") if not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder} holds no store (*.h5); run `hibio prepare` first")
    return found


def _rows(manifest: str | Path | Sequence[SlideRow], root: str | Path | None) -> list[SlideRow]:
    if not isinstance(manifest, str | Path):
        rows = list(manifest)
        if len({row.slide_id for row in rows}) < len(rows):
            raise DataError("two manifest rows have the same slide_id; ids must be unique")
        return rows
    rows, problems = scan_manifest(manifest, root)
    if problems:
        raise DataError(f"manifest {manifest}: " + "; ".join(problems))
    return rows


def _results(tasks: list[SlideTask], workers: int) -> Iterator[SlideResult]:
    if workers <= 1:
        yield from map(_attempt, tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_attempt, task): task for task in tasks}
        for future in as_completed(futures):
            yield _collected(future, futures[future])
        pool.shutdown()
    finally:  # also after Ctrl-C: begin no further slide
        pool.shutdown(wait=False, cancel_futures=True)


def _collected(future: "Future[SlideResult]", task: SlideTask) -> SlideResult:
    try:
        return future.result()
    except BrokenProcessPool:
        reason = "a worker process died (out of memory?); run again with fewer workers"
        return SlideResult(task.row.slide_id, "failed", reason)


def _attempt(task: SlideTask) -> SlideResult:
    """Prepare one slide and turn whatever goes wrong into a result."""
    begin, slide = time.monotonic(), task.row.slide_id
    try:
        done = prepare_slide(task)
        status: Status = "skipped" if done.skipped else "done"
        result = SlideResult(slide, status, done.reason, done.n_spots)
    except (DataError, OSError) as error:
        result = SlideResult(slide, "failed", str(error))
    except Exception as error:  # noqa: BLE001 - one bad slide must never stop the others
        result = SlideResult(slide, "failed", f"unexpected {type(error).__name__}: {error}")
    reason = " ".join(result.reason.split())
    return replace(result, reason=reason, seconds=time.monotonic() - begin)
