"""Figures of the report: each function returns a `Figure(title, caption, png)`."""

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
