"""The curriculum as data: the trainer never asks which stage it is in."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field

from hibio.keys import (
    EMBEDDING_TERMS,
    IMAGE_TERMS,
    MASKED_TERMS,
    TERM_MEMBER,
    TERM_REGION,
    TERM_SPATIAL,
    TERMS,
)


@dataclass(frozen=True)
class StageConfig:
    """One stage.

    Attributes:
        name: shown in the log and in the loss curves.
        epochs: passes over its slides.
        weights: loss term (see :data:`hibio.keys.TERMS`) -> weight; terms left out are off.
        lr: peak learning rate; each stage warms up and decays by a cosine.
        rebuild_every: epochs between rebuilds of the region trees; 0 keeps the first ones.
    """

    name: str
    epochs: int
    weights: dict[str, float] = field(default_factory=dict)
    lr: float = 1e-3
    rebuild_every: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"stage {self.name!r}: epochs is {self.epochs}, at least 1 is needed")
        if not self.lr > 0:
            raise ValueError(f"stage {self.name!r}: lr is {self.lr}, more than 0 is needed")
        if self.rebuild_every < 0:
            raise ValueError(
                f"stage {self.name!r}: rebuild_every is {self.rebuild_every}; 0 (never) or more "
                "epochs are needed"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        for term in self.weights:
            if term not in TERMS:
                near = difflib.get_close_matches(term, TERMS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"stage {self.name!r}: unknown loss term {term!r}{hint} "
                    f"(terms: {', '.join(TERMS)})"
                )
        negative = [term for term, weight in self.weights.items() if not weight >= 0]
        if negative:
            raise ValueError(
                f"stage {self.name!r}: the weight of {negative[0]!r} is "
                f"{self.weights[negative[0]]}, 0 (off) or more is needed"
            )
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError(f"stage {self.name!r}: no loss term has a weight above 0")

    @property
    def active(self) -> dict[str, float]:
        """Terms with a weight above 0."""
        return {term: weight for term, weight in self.weights.items() if weight > 0}

    @property
    def needs_image(self) -> bool:
        """Whether it trains on slides with images only."""
        return bool(IMAGE_TERMS & self.active.keys())

    @property
    def needs_embeddings(self) -> bool:
        """Whether the plain embeddings of the spots are computed."""
        return bool(EMBEDDING_TERMS & self.active.keys())

    @property
    def needs_thinned(self) -> bool:
        """Whether a second view of each spot is drawn."""
        return TERM_SPATIAL in self.active

    @property
    def needs_mask(self) -> bool:
        """Whether the masked view of the omics branch is computed."""
        return bool(MASKED_TERMS & self.active.keys())

    @property
    def needs_regions(self) -> bool:
        """Whether region embeddings are computed."""
        return bool({TERM_REGION, TERM_MEMBER} & self.active.keys())


def stage_lr(stage: StageConfig, step: int, n_steps: int, warmup: float = 0.05) -> float:
    """Learning rate at ``step`` of ``n_steps``: linear warm-up, then cosine to 1 % of the peak."""
    warm = max(1, round(warmup * n_steps))
    if step < warm:
        return stage.lr * (step + 1) / warm
    progress = (step - warm) / max(1, n_steps - warm)
    return stage.lr * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))
