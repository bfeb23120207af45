"""The pictures of a report, from one fold: losses, regions, retrieval, pathways, headline bars."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.embed import embed_slide
from eval.folds.assemble import JobGroup
from eval.folds.fold import ACTIVITY_PREFIX, Fold, split_rows
from eval.measures.metrics import ranks_of_embeddings, recall_at_k, spearman_per_gene, summarise
from eval.measures.ridge import centre, zscore_mean
from eval.report.figures.canvas import Figure
from eval.report.figures.heatmaps import pathway_heatmaps
from eval.report.figures.lines import few_shot_curves, loss_curves, metric_bars, retrieval_curves
from eval.report.figures.regions import niche_maps, region_history, slide_regions
from eval.report.markdown import is_number
from eval.results import SEEN, headlines, task_record
from eval.tasks.domains import DomainsConfig, cluster
from eval.tasks.pathway_query import PathwayQueryConfig, Query
from eval.tasks.probes import ImageProbe
from hibio.checkpoint import TRAINER, load_trainer_state, read_log
from hibio.config.files import ConfigError
from hibio.data.splits import SlideEntry
from preprocessing.graphs import smooth
from preprocessing.store import SlideStore

SHOWN = 4


def gallery(
    groups: Sequence[JobGroup],
    fold: Fold,
    entries: Sequence[SlideEntry],
    results: Mapping[str, Any],
    configs: Mapping[str, Any],
) -> list[Figure]:
    """Figures of the first fold by the tasks' own settings, and bars over all folds."""
    main = groups[0].main
    figures = _losses(groups)
    slide = next(iter(fold.paired_test or fold.test))
    entry = next(e for e in entries if e.slide_id == slide.slide_id)
    kind = "held-out slide" if fold.train else "slide"
    kind = f"slide ({SEEN[fold.mark]})" if fold.mark else kind
    figures.append(_regions(groups[0], entry, f"Regions of the {kind} {entry.slide_id}"))
    figures += _history(main.path, entries)
    if fold.paired_test and fold.model(main.variant).aligned:
        figures.append(_retrieval(fold))
        asked = configs.get("pathway_query", PathwayQueryConfig())
        figures += _heatmaps(fold, main.variant, entry, asked)
    if "domains" in results["tasks"]:
        figures += _niches(fold, main.variant, entry, configs["domains"])
    for task, metric in headlines(results):
        found = task_record(results, task).entries(metric).values()
        if any(is_number(entry.get("mean")) for entry in found):
            figures.append(metric_bars(results, task, metric))
    labelled = results["tasks"].get("annotation", {}).get("models", {})
    for side in ("omics", "image"):
        if any(name.startswith(f"{side}/few_shot@") for m in labelled.values() for name in m):
            figures.append(few_shot_curves(results, side))
    return figures


def _losses(groups: Sequence[JobGroup]) -> list[Figure]:
    logs = {}
    for checkpoint in groups[0].checkpoints:
        records = read_log(checkpoint.path.parent / "log.jsonl")
        if records:
            logs[checkpoint.variant] = records
    return [loss_curves(logs)] if logs else []


def _regions(group: JobGroup, entry: SlideEntry, title: str) -> Figure:
    _, _, regions = embed_slide(group.main, entry.path)
    with SlideStore(entry.path) as store:
        scale = store.thumbnail_downsample or 1.0
        labels = store.labels()
        named = [c for c in labels if labels[c].dtype == object or labels[c].dtype.kind in "OU"]
        return slide_regions(
            store.thumbnail,
            store.xy_px0 / scale,
            regions,
            group.main.run.regions.levels,
            labels[named[0]].to_numpy(dtype=str) if named else None,
            title=title,
        )


def _history(checkpoint: Path, entries: Sequence[SlideEntry]) -> list[Figure]:
    """How the middle level of one training slide changed over the rebuilds."""
    if not (checkpoint / TRAINER).is_file():
        return []
    try:
        regions = load_trainer_state(checkpoint)["regions"]
    except ConfigError as error:
        warnings.warn(f"the figure of the regions over rebuilds is left out: {error}", stacklevel=2)
        return []
    stores = {entry.slide_id: entry.path for entry in entries}
    rebuilt = {name: one for name, one in regions.items() if len(one) > 1 and name in stores}
    if not rebuilt:
        return []
    name = min(rebuilt)
    with SlideStore(stores[name]) as store:
        xy = store.xy_px0
    history = rebuilt[name][:, rebuilt[name].shape[1] // 2].numpy()
    title = f"Regions of the training slide {name} over rebuilds"
    return [region_history(history, xy, title)]


def _niches(fold: Fold, name: str, entry: SlideEntry, config: DomainsConfig) -> list[Figure]:
    """Smoothed clusters of the model and of its input beside the coarsest labels of a slide."""
    slide = next(s for s in fold.test if s.slide_id == entry.slide_id)
    columns = {c: len(set(slide.categories(c)) - {""}) for c in slide.label_columns}
    columns = {c: n for c, n in columns.items() if n > 1}
    models = [m for m in (name, "lsa") if fold.has_model(m) and fold.model(m).omics is not None]
    if not columns or not models:
        return []
    column = min(columns, key=lambda c: (columns[c], c))
    near = slide.neighbours[:, : config.n_neighbours]
    clusters = {}
    for model in models:
        rows = smooth(fold.model(model).rows("omics", [slide])[0], near, config.rounds)
        clusters[model] = cluster(rows, columns[column], "kmeans", config, 0)
    labels = slide.categories(column).astype(str)
    title = f"Niches of {entry.slide_id} against its labels ({column})"
    return [niche_maps(slide.xy_um, labels, clusters, title)]


def _retrieval(fold: Fold) -> Figure:
    curves = {}
    for model in fold.models:
        if model.image is None or model.omics is None or not model.aligned:
            continue
        recalls = []
        fraction = np.linspace(0.0, 1.0, 101)
        for slide in fold.paired_test:
            image, omics = (centre(model.rows(side, [slide])[0]) for side in ("image", "omics"))
            found = ranks_of_embeddings(image, omics)
            recalls.append([_recall(found, share, slide.n_spots) for share in fraction])
        curves[model.name] = (fraction, np.mean(recalls, axis=0))
    return retrieval_curves(curves)


def _recall(found: Any, share: float, n_items: int) -> float:
    k = round(share * n_items)
    return 0.0 if k == 0 else float(recall_at_k(found, k))


def _heatmaps(fold: Fold, name: str, entry: SlideEntry, config: PathwayQueryConfig) -> list[Figure]:
    """The best-read pathways of one slide and, beside them, the median one: not only the best."""
    if fold.anchors is None or not len(fold.anchors.names) or not fold.paired_train:
        return []
    query = Query.of(fold, fold.anchors)
    probe = ImageProbe.of(fold, fold.model(name))
    ridge = split_rows(probe.ridge(query.train, config.ridge), fold.paired_test)
    nearest = split_rows(probe.nearest(query.train, config.k), fold.paired_test)
    index = [slide.slide_id for slide in fold.paired_test].index(entry.slide_id)
    score, measured = zscore_mean(ridge[index], nearest[index]), query.test[index]
    quality = np.nan_to_num(spearman_per_gene(score, measured), nan=-1.0)
    order = np.argsort(-quality, kind="stable")
    chosen = [*order[: SHOWN - 1], order[len(order) // 2]]
    labels = fold.paired_test[index].labels
    maps = []
    for m in chosen:
        column = ACTIVITY_PREFIX + query.names[m]
        planted = labels[column].to_numpy(dtype=float) if column in labels else None
        maps.append((query.names[m], score[:, m], measured[:, m], planted))
    with SlideStore(entry.path) as store:
        scale = store.thumbnail_downsample or 1.0
        title = (
            f"Gene sets from H&E alone on {entry.slide_id}: the three best-read and the median one "
            f"(median Spearman over all {len(quality)}: {summarise(quality).median:.2f})"
        )
        return [pathway_heatmaps(store.thumbnail, store.xy_px0 / scale, maps, title=title)]
