"""Manifest -> slide stores: one file a slide, resumable; one bad slide never stops the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.errors import DataError
from preprocessing.files import remove_abandoned, require_plain_name
from preprocessing.gene_ids import GeneMapConfig
from preprocessing.gene_ids.table import read_gene_table
from preprocessing.manifest import scan_manifest
from preprocessing.patches import PatchConfig
from preprocessing.run.preparation import SlideResult, Status, attempt_slide
from preprocessing.run.sifting import Images, QualityConfig, SlideTask
from preprocessing.slide_row import SlideRow
from preprocessing.slides import require_backend
from preprocessing.store.layout import ENCODERS
from preprocessing.workers import Lost, gathered, require_workers

__all__ = ["PrepareReport", "SlideResult", "Status", "prepare"]

DEFAULT_MINUTES = 120.0  # a slide; the largest take some ten minutes


@dataclass(frozen=True)
class PrepareReport:
    """The results of `prepare`, in the order of the manifest."""

    rows: tuple[SlideResult, ...]

    @property
    def failed(self) -> tuple[SlideResult, ...]:
        """The slides that have no new store."""
        return tuple(row for row in self.rows if row.status == "failed")

    def __str__(self) -> str:
        """Return a table, one line a slide, and a word on patches that differ in width."""
        width = max([len("slide"), *(len(row.slide_id) for row in self.rows)])
        lines = [f"{'slide':<{width}}  status   {'spots':>7}  patch_um  {'seconds':>7}  reason"]
        lines += [
            f"{r.slide_id:<{width}}  {r.status:<7}  {r.n_spots:>7}  {r.patch_um or '-':>8}  "
            f"{r.seconds:>7.1f}  {r.reason}"
            for r in self.rows
        ]
        widths = sorted({row.patch_um for row in self.rows} - {0.0})
        if len(widths) > 1:
            told = " and ".join(f"{um:g}" for um in widths)
            lines.append(
                f"patches are {told} um wide, as the arrays; a model reads one width: prepare all "
                "of its slides with one --patch-um"
            )
        return "\n".join(line.rstrip() for line in lines)


def prepare(
    manifest: str | Path | Sequence[SlideRow],
    out: str | Path,
    root: str | Path | None = None,
    patch: PatchConfig | None = None,
    workers: int = 0,
    images: Images = "jpeg",
    quality: QualityConfig | None = None,
    *,
    genes: GeneMapConfig | None = None,
    scheduler: str | None = None,
    minutes: float = DEFAULT_MINUTES,
    backend: str = "auto",
    fix_registration: bool = False,
) -> PrepareReport:
    """Prepare every slide of a manifest: ``<out>/<slide_id>.h5``.

    A slide whose store was made from the same files with the same settings is skipped, so the same
    call continues an interrupted run. Several runs may write into one folder.

    Args:
        manifest: CSV file, or rows.
        out: folder of the stores; made when missing.
        root: folder that relative paths start from; None: the manifest's own.
        patch: size of the patches, and of their context; None: `PatchConfig()`.
        workers: processes beside this one; a damaged file that crashes or hangs a library then
            costs its slide only. 0 works in this process, without that protection.
        images: "jpeg" (quality 90) or "raw" patches.
        quality: limits for leaving out spots.
        genes: table by which genes are named anew; None keeps the names of the sources.
        scheduler: address of a Dask scheduler, whose workers are used in place of ``workers``.
        minutes: after which a slide is given up (``workers`` 1 or more).
        backend: what decodes the images; see `preprocessing.slides.open_slide`.
        fix_registration: move spots that do not lie where the image shows them, as
            `preprocessing.registration` finds; the store says so.

    Returns:
        One result a slide. Slides with missing or bad files are "failed" there.

    Raises:
        DataError: the manifest as a whole cannot be used, or an argument is out of range.
    """
    require_workers(workers)
    _check(minutes, images, genes)
    require_backend(backend)
    out, patch, quality = Path(out), patch or PatchConfig(), quality or QualityConfig()
    rows = _rows(manifest, root)
    out.mkdir(parents=True, exist_ok=True)
    same = (patch, images, quality, genes, backend, fix_registration)
    tasks = [SlideTask(row, out / f"{row.slide_id}.h5", *same) for row in rows]
    remove_abandoned(out)
    try:
        return _report(tasks, workers, scheduler, 60 * minutes)
    finally:
        remove_abandoned(out)


def _report(
    tasks: list[SlideTask], workers: int, scheduler: str | None, limit_s: float
) -> PrepareReport:
    named = {task.row.slide_id: task for task in tasks}
    found = gathered(attempt_slide, named, "prepare", workers, scheduler, limit_s)
    return PrepareReport(
        tuple(
            SlideResult(name, "failed", one.reason, seconds=one.seconds)
            if isinstance(one, Lost)
            else one
            for name, one in found.items()
        )
    )


def _check(minutes: float, images: str, genes: GeneMapConfig | None) -> None:
    """Refuses arguments, and a gene table that cannot be used, before any slide."""
    if not minutes > 0:
        raise DataError(f"minutes is {minutes}; expected more than 0 minutes a slide")
    if images not in ENCODERS:
        raise DataError(f"images is {images!r}; choose {' or '.join(ENCODERS)}")
    if genes is not None:
        read_gene_table(genes.table).check_target(genes.target)


def _rows(manifest: str | Path | Sequence[SlideRow], root: str | Path | None) -> list[SlideRow]:
    if not isinstance(manifest, str | Path):
        rows = list(manifest)
        for row in rows:
            require_plain_name("slide_id", row.slide_id)
        if len({row.slide_id for row in rows}) < len(rows):
            raise DataError("two manifest rows have the same slide_id; ids must be unique")
        return rows
    rows, problems = scan_manifest(manifest, root)
    if problems:
        raise DataError(f"manifest {manifest}: " + "; ".join(problems))
    return rows
