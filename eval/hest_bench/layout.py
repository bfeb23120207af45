"""The folder layout of HEST-Bench: which samples, genes and folds a task has.

``<folder>/<TASK>/splits/train_<k>.csv`` and ``test_<k>.csv`` (columns sample_id, patches_path,
expr_path; paths relative to the task), ``var_50genes.json`` ({"genes": [...]}), ``patches/*.h5``,
``adata/*.h5ad``. Nothing is read here but the CSVs and the gene list.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from preprocessing.errors import DataError, did_you_mean

GENE_LIST = "var_50genes.json"
COLUMNS = ("sample_id", "patches_path", "expr_path")
_PATIENT = ("patient", "patient_id")
_SPLIT = re.compile(r"(train|test)_(\d{1,4})\.csv")
_PLAIN_NAME = re.compile(r"[\w.+ -]{1,120}")


@dataclass(frozen=True)
class Sample:
    """One section of a task; ``patient`` is "" where the CSV does not say."""

    sample_id: str
    patches: Path
    expression: Path
    patient: str = ""


@dataclass(frozen=True)
class BenchSplit:
    """One fold, by the number in the names of its two files."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


@dataclass(frozen=True)
class BenchTask:
    """One task: its published genes in their order, and its folds in the order of their numbers."""

    name: str
    root: Path
    genes: tuple[str, ...]
    splits: tuple[BenchSplit, ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Every sample once, by name."""
        found = {s.sample_id: s for split in self.splits for s in (*split.train, *split.test)}
        return tuple(found[name] for name in sorted(found))


def read_tasks(folder: Path, wanted: Sequence[str] = ()) -> list[BenchTask]:
    """The tasks of a benchmark folder.

    Args:
        folder: the folder with one folder a task, or the folder of one task.
        wanted: names of tasks; all when empty.

    Raises:
        DataError: no task there, an unknown name, or a task whose files do not fit together.
    """
    if (folder / "splits").is_dir():
        roots = [folder]
    else:
        roots = sorted(p.parent for p in folder.glob("*/splits") if p.is_dir())
    if not roots:
        raise DataError(
            f"{folder}: no task there; expected {folder}/<TASK>/splits/train_0.csv as the "
            "published benchmark has it (or the folder of one task)"
        )
    by_name = {root.resolve().name: root for root in roots}
    for name in wanted:
        if name not in by_name:
            hint = did_you_mean(name, by_name)
            raise DataError(f"{folder}: no task {name!r} (it has: {', '.join(by_name)}){hint}")
    return [_read_task(name, by_name[name]) for name in by_name if not wanted or name in wanted]


def _read_task(name: str, root: Path) -> BenchTask:
    sides: dict[int, dict[str, Path]] = {}
    for path in sorted((root / "splits").iterdir()):
        found = _SPLIT.fullmatch(path.name)
        if found:
            number = int(found[2])
            if found[1] in sides.setdefault(number, {}):
                raise DataError(f"{path}: fold {number} is there twice; remove one of the files")
            sides[number][found[1]] = path
    lonely = [number for number, files in sides.items() if len(files) < 2]
    if lonely or not sides:
        what = f"fold {lonely[0]} lacks its other file" if lonely else "no fold"
        raise DataError(
            f"{root / 'splits'}: {what}; expected train_<k>.csv and test_<k>.csv for every fold"
        )
    splits = tuple(
        BenchSplit(str(k), _samples(sides[k]["train"], root), _samples(sides[k]["test"], root))
        for k in sorted(sides)
    )
    task = BenchTask(name, root, read_gene_list(root / GENE_LIST), splits)
    _check_one_place(task)
    return task


def read_gene_list(path: Path) -> tuple[str, ...]:
    """The genes of a task, in the published order.

    Raises:
        DataError: missing, not JSON, or no list of different names under "genes".
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the gene list of the task")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        genes = content["genes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: no JSON object with a list 'genes' ({error!r})") from error
    if not isinstance(genes, list) or not genes or not all(isinstance(g, str) for g in genes):
        raise DataError(f"{path}: 'genes' must be a list of gene names")
    if len(set(genes)) < len(genes):
        raise DataError(f"{path}: a gene is listed twice; the benchmark predicts each once")
    return tuple(genes)


def _samples(path: Path, root: Path) -> tuple[Sample, ...]:
    """The rows of one split file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error
    missing = [c for c in COLUMNS if rows and c not in rows[0]]
    if missing or not rows:
        what = f"no column {missing[0]!r}" if missing else "no row"
        raise DataError(f"{path}: {what}; expected the columns {', '.join(COLUMNS)}")
    samples = []
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        values = {key: (row.get(key) or "").strip() for key in (*COLUMNS, *_PATIENT)}
        name = values["sample_id"]
        if not _PLAIN_NAME.fullmatch(name) or set(name) <= {"."}:
            raise DataError(f"{where}: sample_id {name!r} is no plain name")
        patches = _inside(root, values["patches_path"], where)
        expression = _inside(root, values["expr_path"], where)
        patient = values["patient"] or values["patient_id"]
        samples.append(Sample(name, patches, expression, patient))
    names = [sample.sample_id for sample in samples]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a sample is listed twice; each spot must count once")
    return tuple(samples)


def _inside(root: Path, text: str, where: str) -> Path:
    """A path of a CSV below the task; links in the folder are the owner's and are followed."""
    posix, windows = PurePosixPath(text), PureWindowsPath(text)
    escapes = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if not text or "\0" in text or escapes:
        raise DataError(
            f"{where}: path {text!r} does not stay inside {root}; expected a path relative to the "
            "task's folder, such as patches/TENX95.h5"
        )
    path = root / posix
    if not path.is_file():
        raise DataError(f"{where}: {path} is missing; download the whole task")
    return path


def _check_one_place(task: BenchTask) -> None:
    """A sample has the same files and the same patient in every split."""
    known: dict[str, Sample] = {}
    for sample in (s for split in task.splits for s in (*split.train, *split.test)):
        if known.setdefault(sample.sample_id, sample) != sample:
            raise DataError(
                f"task {task.name}: sample {sample.sample_id} has other files or another patient "
                "in another split; a sample is one section"
            )
