"""Expression prediction from H&E (METHOD section 6.1; read-outs of section 6, last paragraph).

Metrics: ``pearson/top50_hvg`` is ridge with its penalty from inner folds; ``pearson_hest`` uses the
fixed HEST penalty, ``pearson_bleep`` the mean of 50 training spots, ``pearson_both`` ridge on [raw
features, embedding], ``pearson_combined`` the z-scored mean of the last two. A model that predicts
expression itself is scored on that under ``pearson``; ridge on its embedding is ``pearson_ridge``.
One value per test slide (mean over genes); ``..._pooled`` is over all test spots of the fold.
Shapes: S spots, T target genes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from eval.fold import Fold, SlideData, neighbour_mean, stack
from eval.metrics import pearson_per_gene, summarise
from eval.readouts import RidgeConfig, zscore_mean
from eval.results import ResultTable, TaskResult
from eval.tasks.image_probe import ImageProbe, split_rows
from eval.variable_genes import expression, variable_genes

UNIT = "Pearson r per slide, mean over genes"
POOLED = "Pearson r over all test spots, mean over genes"


@dataclass(frozen=True)
class ExpressionConfig:
    """Settings of expression prediction.

    Args:
        n_genes: sizes of the target sets, highly variable on the training slides.
        min_detected: share of training spots in which a target should be detected.
        ridge: PCA and ridge.
        bleep_k: training spots in the retrieval mean.
        raw: name of the model whose features stand beside the embedding in ``both``; where no model
            has it, ``Fold.raw_features`` do.
    """

    n_genes: tuple[int, ...] = (50, 200)
    min_detected: float = 0.1
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    bleep_k: int = 50
    raw: str = "raw_features"


@dataclass(frozen=True)
class Targets:
    """Log expression of the target genes: training spots stacked, test spots by slide.

    ``genes`` (T,) are their indices in the vocabulary.
    """

    name: str
    genes: np.ndarray
    train: np.ndarray
    test: list[np.ndarray]


def run(fold: Fold, config: ExpressionConfig) -> TaskResult:
    """Predict variable genes of the test slides from every model's image embedding."""
    table = ResultTable("expression")
    if not fold.paired_train or not fold.paired_test:
        table.note(f"fold {fold.name}: no training or no test slide with an image; not run")
        return table.result()
    probes = {m.name: ImageProbe.of(fold, m) for m in fold.models if m.image is not None}
    raw = probes.get(config.raw)
    if raw is None and fold.raw_features is not None:
        raw = ImageProbe.of(fold, fold.raw_features)
    direct = [m for m in fold.models if m.prediction is not None]
    for targets in _target_sets(fold, config, table):
        _add_references(table, fold, targets)
        for name, probe in probes.items():
            for suffix, parts in _predictions(probe, targets, raw, config):
                own = fold.model(name).prediction is not None and not suffix
                _add(table, fold, (name, "_ridge" if own else suffix, targets), parts)
        for model in direct:
            rows = model.predicted(fold.paired_test, targets.genes)
            _add(table, fold, (model.name, "", targets), [stack(rows)])
    if raw is None:
        table.note(f"no model {config.raw!r}: the read-outs 'both' and 'combined' are left out")
    return table.result(fold.models)


def _target_sets(fold: Fold, config: ExpressionConfig, table: ResultTable) -> Iterator[Targets]:
    order = variable_genes(fold.train, max(config.n_genes), config.min_detected)
    train = [_dense(slide, order) for slide in fold.paired_train]
    test = [_dense(slide, order) for slide in fold.paired_test]
    for n in config.n_genes:
        name = f"top{n}_hvg"
        if len(order) < n:
            table.note(f"{name}: the vocabulary has only {len(order)} genes; all are used")
        for slide, values in zip(fold.paired_test, test, strict=True):
            constant = int((np.ptp(values[:, :n], axis=0) == 0).sum())
            if constant:
                table.note(
                    f"{name}: {constant} genes are constant on test slide {slide.slide_id} "
                    f"(fold {fold.name}) and left out there"
                )
        yield Targets(name, order[:n], stack(train)[:, :n], [values[:, :n] for values in test])


def _predictions(
    probe: ImageProbe, targets: Targets, raw: ImageProbe | None, config: ExpressionConfig
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Suffix of the metric, and the predictions whose z-scored mean is the read-out."""
    ridge = probe.ridge(targets.train, config.ridge)
    bleep = probe.nearest(targets.train, config.bleep_k)
    yield "", [ridge]
    yield "_hest", [probe.ridge(targets.train, config.ridge, alpha="hest")]
    yield "_bleep", [bleep]
    if raw is None:
        return
    both = ridge if raw is probe else probe.ridge(targets.train, config.ridge, beside=raw)
    if raw is not probe:
        yield "_both", [both]
    yield "_combined", [both, bleep]


def _add(
    table: ResultTable, fold: Fold, cell: tuple[str, str, Targets], parts: list[np.ndarray]
) -> None:
    model, suffix, targets = cell
    by_slide = [split_rows(part, fold.paired_test) for part in parts]
    for index, slide in enumerate(fold.paired_test):
        mixed = zscore_mean(*(part[index] for part in by_slide))
        r = summarise(pearson_per_gene(mixed, targets.test[index])).mean
        table.add(model, f"pearson{suffix}/{targets.name}", fold.key(slide.slide_id), r, UNIT)
    pooled = summarise(pearson_per_gene(zscore_mean(*parts), stack(targets.test))).mean
    table.add(model, f"pearson{suffix}_pooled/{targets.name}", fold.key("pooled"), pooled, POOLED)


def _add_references(table: ResultTable, fold: Fold, targets: Targets) -> None:
    """The mean of the training spots, and the neighbours' true expression."""
    flat = np.tile(targets.train.mean(axis=0), (sum(len(t) for t in targets.test), 1))
    _add(table, fold, ("mean", "", targets), [flat])
    table.note("mean: a constant prediction has no correlation; it is reported as 0")
    near = [
        neighbour_mean(values, slide.neighbours)
        for slide, values in zip(fold.paired_test, targets.test, strict=True)
    ]
    _add(table, fold, ("neighbour_oracle", "", targets), [stack(near)])
    table.note("neighbour_oracle: reference that sees the test counts of the neighbouring spots")


def _dense(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    return np.asarray(expression(slide)[:, genes].toarray())
