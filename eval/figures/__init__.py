"""Figures of the report: each function returns a `Figure(title, caption, png)`."""

from eval.figures.bars import metric_bars
from eval.figures.canvas import Figure
from eval.figures.curves import loss_curves, retrieval_curves
from eval.figures.few_shot import few_shot_curves
from eval.figures.heatmaps import expression_maps, pathway_heatmaps
from eval.figures.niches import niche_maps
from eval.figures.regions import region_history, slide_regions

__all__ = [
    "Figure",
    "expression_maps",
    "few_shot_curves",
    "loss_curves",
    "metric_bars",
    "niche_maps",
    "pathway_heatmaps",
    "region_history",
    "retrieval_curves",
    "slide_regions",
]
