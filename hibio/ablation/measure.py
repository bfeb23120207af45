"""One checkpoint of a grid on the held-out slides of its fold, beside the same targets as all rows.

Targets, vocabulary and gene sets of a fold are those that the reference row fits on the training
slides, so that rows with other genes or other gene sets are measured by the same ruler.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.assemble import IMPUTATION, representations, slide_data, stored_features
from eval.baselines import baselines, random_sets, raw_features
from eval.embed import Checkpoint
from eval.fold import Fold, Representation
from eval.hidden_genes import hide, with_representations
from eval.model_names import NO_FOLD
from eval.results import TaskResult
from eval.tasks import find_task
from hibio.ablation.plan import GridJob
from hibio.artifacts import Artifacts
from hibio.config import ConfigError
from hibio.data.splits import SlideEntry
from hibio.jobs import split_of
from hibio.run import fitted


@dataclass(frozen=True)
class Ruler:
    """What the rows of one fold are measured with; nothing in it depends on a row or a seed.

    Attributes:
        fold: slides and targets, without models.
        entries: every slide of the fold.
        artifacts: of the reference row.
        raw: stored image features, which stand beside an embedding in some read-outs; or None.
    """

    fold: Fold
    entries: tuple[SlideEntry, ...]
    artifacts: Artifacts
    raw: Representation | None


def make_ruler(job: GridJob, tasks: Collection[str]) -> Ruler:
    """Fit the reference's artifacts on the training slides and read the slides of the fold.

    Args:
        job: any job of the fold.
        tasks: names of the tasks; ``imputation`` hides genes.

    Raises:
        ConfigError: the fold holds no slide out that can be measured.
    """
    reference = job.reference
    split = split_of(reference.config, reference.fold)
    train_entries, test_entries = split.train, split.test
    if reference.fold == NO_FOLD:  # the transductive setting: measured on what was trained on
        train_entries, test_entries = (), split.train
    if not test_entries:
        raise ConfigError(f"fold {reference.fold} of {job.cell.name} holds no slide out")
    artifacts = fitted(reference)
    train = tuple(slide_data(entry, artifacts) for entry in train_entries)
    test = tuple(slide_data(entry, artifacts) for entry in test_entries)
    entries = (*train_entries, *test_entries)
    hidden = None
    if IMPUTATION in tasks:
        hidden = hide(train, test, artifacts.genes, artifacts.tfidf.transform)
    fold = Fold(
        name=reference.fold,
        seed=reference.seed,
        genes=artifacts.genes,
        train=train,
        test=test,
        anchors=artifacts.anchors,
        factors=artifacts.factors,
        hidden=hidden,
    )
    features = stored_features(entries, reference.config.data.image)
    raw = None
    if features is not None:
        raw = raw_features((*train, *test), features, artifacts.factors)
    return Ruler(fold, entries, artifacts, raw)


def measure(
    ruler: Ruler, checkpoint: Checkpoint, tasks: Sequence[str]
) -> tuple[list[TaskResult], float]:
    """Run tasks on one trained row.

    Args:
        ruler: of its fold.
        checkpoint: the trained row.
        tasks: names of :data:`eval.tasks.TASKS`.

    Returns:
        Results that hold this row alone, and the seconds it took.
    """
    started = time.perf_counter()
    row = checkpoint.variant
    models = representations(checkpoint, ruler.entries, ruler.artifacts)
    fold = dataclasses.replace(
        ruler.fold, seed=checkpoint.seed, models=tuple(models), raw_features=ruler.raw
    )
    if fold.hidden is not None:
        hidden = with_representations(
            fold.hidden, [checkpoint], ruler.entries, ruler.artifacts, with_baselines=False
        )
        fold = dataclasses.replace(fold, hidden=hidden)
    results = []
    for name in _bar(tasks):
        task = find_task(name)
        with threadpool_limits(1):
            result = task.run(fold, task.config())
        own = {model: values for model, values in result.models.items() if model == row}
        results.append(TaskResult(name, own, result.notes))
    return results, time.perf_counter() - started


def measure_baselines(ruler: Ruler, tasks: Sequence[str]) -> tuple[list[TaskResult], float]:
    """Run tasks on everything that needs no training: once a fold.

    Args:
        ruler: of the fold.
        tasks: names of :data:`eval.tasks.TASKS`.
    """
    started = time.perf_counter()
    fold, artifacts = ruler.fold, ruler.artifacts
    fitted_on = fold.train or fold.test
    held_out = fold.test if fold.train else ()
    models = list(baselines(fitted_on, held_out, artifacts.factors))
    models += [] if ruler.raw is None else [ruler.raw]
    random = None
    if artifacts.database is not None:
        idf, genes = np.asarray(artifacts.tfidf.idf), list(artifacts.genes)
        random = random_sets(artifacts.database, genes, idf, fitted_on, fold.seed)
    fold = dataclasses.replace(fold, models=tuple(models), random_sets=random)
    if fold.hidden is not None:
        hidden = with_representations(
            fold.hidden, [], ruler.entries, artifacts, with_baselines=True
        )
        fold = dataclasses.replace(fold, hidden=hidden)
    results = []
    for name in _bar(tasks):
        task = find_task(name)
        with threadpool_limits(1):
            results.append(task.run(fold, task.config()))
    return results, time.perf_counter() - started


def _bar(tasks: Sequence[str]) -> tqdm[str]:
    return tqdm(tasks, desc="measure", disable=None, leave=False)
