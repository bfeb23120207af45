"""What a run takes over from the checkpoint that its omics tower starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hibio.artifacts import Artifacts
from hibio.config import ConfigError

EXPRESSION = ("tfidf", "factors", "groups", "gene_graphs", "node_genes", "n_folded_in")


def check_start(start: Artifacts, genes: Mapping[str, Any], modality: str) -> None:
    """The expression side of a warm start is its checkpoint's, so the settings must say so."""
    if start.modality != modality:
        raise ConfigError(
            f"model.omics.init_from was trained on {start.modality}, these stores hold {modality}"
        )
    differ = [
        f"{key}: {genes[key]} here, {value} there"
        for key, value in start.settings["genes"].items()
        if key != "target_genes" and genes.get(key) != value
    ]
    if differ:
        raise ConfigError(
            "genes settings differ from those of model.omics.init_from, whose vocabulary and "
            f"factors are taken over ({'; '.join(differ)}); copy its genes section"
        )


def expression_of(start: Artifacts) -> dict[str, Any]:
    """Everything fitted on counts, as ``fit_artifacts`` would have fitted it."""
    return {name: getattr(start, name) for name in EXPRESSION}


def slides_seen(start: Artifacts) -> list[str]:
    """Slides of every run that a warm start goes back to, not only of the last."""
    return sorted({*start.train_slides, *start.settings["pretrain_slides"]})
