"""Region trees against the labels of held-out slides (docs/method.md 5, Regions).

A region is contiguous and a domain need not be, so the truth is the contiguous pieces of each
label column. ``ari/matched`` cuts the tree into as many regions as there are pieces (as domain
clustering is told K), ``ari/<level>`` at the model's own sizes; ``ari/best_column`` is the better
of the label columns of a slide. Every model with an omics embedding gets a tree; the tree of
``coordinates`` is the control that knows positions alone.
Shapes: S spots, D dimensions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from eval.folds.fold import Fold, Representation, SlideData
from eval.measures.metrics import WORDS, ari
from eval.results import Measure, Question, ResultTable, TaskResult
from hibio.config.schema import Count, Range
from hibio.keys import level_name
from hibio.regions import DIAMETERS_UM, RegionTree, fit_region_tree, region_levels
from preprocessing.graphs import KNNGraph, SpotGraph, smooth

QUESTION = Question(
    "regions",
    "Region trees cut on held-out slides, compared with the contiguous pieces of the labels; "
    "coordinates is the control that knows positions alone.",
    ("ari/matched", "ari/best_column", "ari/600um"),
)
UNIT = "ARI per slide and label column, against the contiguous pieces of the labels"


@dataclass(frozen=True)
class RegionsTaskConfig:
    """Settings of the region task.

    Args:
        neighbours: of the spatial graph.
        min_piece: a piece with fewer spots is not counted when the tree is cut (its spots are).
        diameters_um: sizes of the levels.
    """

    neighbours: Count = 6
    min_piece: Count = 5
    diameters_um: tuple[Annotated[float, Range(0, 1e6, "low")], ...] = DIAMETERS_UM


def run(fold: Fold, config: RegionsTaskConfig) -> TaskResult:
    """Cut every model's region tree on the test slides and compare it with the labels."""
    table = ResultTable(QUESTION)
    cases = [case for slide in fold.test for case in _cases(slide, config)]
    if not cases:
        table.note(f"fold {fold.name}: no test slide has a column with two classes; not run")
    for model in fold.models:
        if model.omics is None:
            continue
        best: dict[str, float] = {}
        for slide, graph, column, piece in cases:
            tree = _tree(model, slide, graph)
            key = fold.key(f"{slide.slide_id}:{column}")
            matched = _matched(tree, piece, config)
            best[slide.slide_id] = max(matched, best.get(slide.slide_id, -1.0))
            table.add(model.name, _measure("matched"), key, matched, 0.0)
            levels = region_levels(tree, slide.xy_um, graph, config.diameters_um)
            for diameter, level in zip(config.diameters_um, levels, strict=True):
                value = _score(piece, level)
                table.add(model.name, _measure(level_name(diameter)), key, value, 0.0)
        for slide_id, value in best.items():
            table.add(model.name, _measure("best_column"), fold.key(slide_id), value, 0.0)
    return table.result(fold.models)


def _measure(cut: str) -> Measure:
    return Measure(f"ari/{cut}", UNIT, words=(WORDS["ari"],))


def contiguous_pieces(labels: np.ndarray, graph: SpotGraph) -> np.ndarray:
    """Piece (S,) of each spot: spots of one label that touch; -1 where there is no label."""
    edges = graph.matrix().tocoo()
    same = (labels[edges.row] == labels[edges.col]) & (labels[edges.row] != "")
    shape = (len(labels), len(labels))
    joined = sparse.coo_matrix((np.ones(same.sum()), (edges.row[same], edges.col[same])), shape)
    piece = connected_components(joined, directed=False)[1]
    return np.where(labels == "", -1, piece)


def _cases(
    slide: SlideData, config: RegionsTaskConfig
) -> Iterator[tuple[SlideData, SpotGraph, str, np.ndarray]]:
    graph = KNNGraph(k=config.neighbours).build(slide.xy_um)
    for column in slide.label_columns:
        labels = slide.categories(column)
        if len(set(labels.tolist()) - {""}) >= 2:
            yield slide, graph, column, contiguous_pieces(labels, graph)


def _tree(model: Representation, slide: SlideData, graph: SpotGraph) -> RegionTree:
    """The model's own tree, or Ward on its omics embedding smoothed once over the neighbours."""
    if model.trees is not None and slide.slide_id in model.trees:
        return model.trees[slide.slide_id]
    rows = model.rows("omics", [slide])[0]
    return fit_region_tree(smooth(rows, slide.neighbours, 1), graph)


def _matched(tree: RegionTree, piece: np.ndarray, config: RegionsTaskConfig) -> float:
    size = np.bincount(piece[piece >= 0])
    return _score(piece, tree.cut(max(1, int((size >= config.min_piece).sum()))))


def _score(piece: np.ndarray, region: np.ndarray) -> float:
    known = piece >= 0
    return ari(piece[known].astype(str), region[known].astype(str))
