"""Sections of a configuration that say how it is trained: stages, objective, sampler, optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from hibio.config.schema import Correlation, Micrometres, Range, Share, Temperature
from hibio.keys import EMBEDDING_TERMS, IMAGE_TERMS, MASKED_TERMS, TERM_SPATIAL, TERMS
from preprocessing.errors import did_you_mean

#: Keys of ``optim`` that say where the work is done and decide no number.
LAYOUT = ("engine", "zero", "offload", "deepspeed")


@dataclass(frozen=True)
class StageConfig:
    """One stage; its length is given once, in ``steps`` or in ``epochs``.

    Attributes:
        name: shown in the log and in the loss curves.
        epochs: passes over its slides; how many steps these are follows from the cohort, and for
            one small slide it is a step each.
        weights: loss term (see :data:`hibio.keys.TERMS`) -> weight; terms left out are off.
        lr: peak learning rate; each stage warms up and decays by a cosine.
        rebuild_every: between rebuilds of the region trees, in the unit of the length; trees
            change between epochs, so a rebuild waits for the end of one. 0 keeps the first ones.
        steps: optimiser steps, whatever the number of slides.
    """

    name: str
    epochs: Annotated[int, Range(1)] | None = None
    weights: dict[str, Annotated[float, Range(0, 1e6)]] = field(default_factory=dict)
    lr: Annotated[float, Range(0, 10, "low")] = 1e-3
    rebuild_every: Annotated[int, Range(0)] = 0
    steps: Annotated[int, Range(1)] | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"stage {self.name!r}: steps is {self.steps} and epochs is {self.epochs}; give one "
                "of them, and null for the other where a base file has it"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        for term in self.weights:
            if term not in TERMS:
                raise ValueError(
                    f"stage {self.name!r}: unknown loss term {term!r}{did_you_mean(term, TERMS)} "
                    f"(terms: {', '.join(TERMS)})"
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


def stage_lr(stage: StageConfig, step: int, n_steps: int, warmup: float = 0.05) -> float:
    """Learning rate at ``step`` of ``n_steps``: linear warm-up, then cosine to 1 % of the peak."""
    warm = max(1, round(warmup * n_steps))
    if step < warm:
        return stage.lr * (step + 1) / warm
    progress = (step - warm) / max(1, n_steps - warm)
    return stage.lr * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of the loss terms.

    Attributes:
        negatives: same_slide | all | mixed (docs/method.md 5, slide shortcut).
        targets: identity | soft (a control: alike spots share the target mass, and none is left
            out of the negatives).
        target_temperature: of the soft targets; larger spreads them.
        duplicate_um: of identity targets: pairs of one slide closer than this ...
        duplicate_correlation: ... whose spot vectors correlate above this are no negatives.
        mask_genes: share of keyword genes hidden in the masked view.
        mask_spots: share of whole spots hidden.
        query_genes: genes outside its keywords that the masked view of a spot is asked about
            (most are 0), so that the decoder learns absence too; imputation needs it.
        contrast_um: radius of the spatial contrast (docs/method.md 3.1) ...
        contrast_correlation: ... within which spots whose spot vectors correlate above this are
            positives.
        drop_genes: share of keyword genes that each view of the spatial contrast lacks.
        keep_counts: share of its counts that the second view keeps.
        anchors_per_step: pathways encoded anew in a step; the others come from the cache.
    """

    negatives: Literal["same_slide", "all", "mixed"] = "same_slide"
    targets: Literal["identity", "soft"] = "identity"
    target_temperature: Temperature = 0.1
    duplicate_um: Micrometres = 150.0
    duplicate_correlation: Correlation = 0.95
    mask_genes: Share = 0.2
    mask_spots: Share = 0.15
    query_genes: Annotated[int, Range(0, 65_536)] = 0
    contrast_um: Micrometres = 150.0
    contrast_correlation: Correlation = 0.5
    drop_genes: Share = 0.2
    keep_counts: Annotated[float, Range(0, 1, "low")] = 0.7
    anchors_per_step: Annotated[int, Range(1)] = 32


@dataclass(frozen=True)
class SamplerConfig:
    """How spots are drawn.

    Attributes:
        batch_spots: core spots of a batch, about (whole regions are never split).
        slides_per_batch: slides that share a batch; 1 keeps the slide shortcut out of the
            contrast (docs/method.md 5).
        balance: slide (every slide gives the same number of batches) | spot (by its size).
        halo: hops of context round the core spots while training.
        window: slides whose batches are mixed with each other; the next ones follow when these are
            through. With data.cache_slides as large, a slide is read once an epoch.
        weights: column (technology, organism, tissue) -> value -> how many batches its slides
            give, relative to slides that no weight names (1); 0 leaves them out. A slide that
            several columns name has the product.
        batches_per_step: N batches make the global batch of one optimiser step, over which the
            losses compare and average, whatever number of processes shares them; what is left of
            an epoch after the last N is dropped.
    """

    batch_spots: Annotated[int, Range(2)] = 512
    slides_per_batch: Annotated[int, Range(1)] = 1
    balance: Literal["slide", "spot"] = "slide"
    halo: Annotated[int, Range(0, 1000)] = 1
    window: Annotated[int, Range(1)] = 64
    weights: dict[str, dict[str, Annotated[float, Range(0, 1e6)]]] = field(default_factory=dict)
    batches_per_step: Annotated[int, Range(1, 100_000)] = 1

    def __post_init__(self) -> None:
        if self.window < self.slides_per_batch:
            raise ValueError(
                f"window is {self.window}, at least slides_per_batch ({self.slides_per_batch}) "
                "slides are needed; 64 is usual"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and how it is spread over processes.

    Attributes:
        weight_decay: on matrices; vectors and scalars have none.
        clip: largest gradient norm.
        graph_rate: learning rate of the gene graph's scales over that of the stage: one number a
            head, which at the rate of a matrix would stay where it starts.
        shares_every: steps between looks at each term's share of the gradient, which go into the
            log (``gradient_shares``); 0 for never.
        precision: auto (bf16 autocast on CUDA devices that have it, else fp32) | fp32 | bf16
            (autocast anywhere); parameters, gradients and optimiser state stay in fp32.
        engine: auto (deepspeed where one of the keys below asks for it, else torch) | torch
            (one process, or data-parallel ones) | deepspeed.
        zero: what DeepSpeed partitions over the processes: 0 nothing | 1 optimiser state | 2 and
            gradients | 3 and parameters.
        offload: none | optimizer (its state to CPU memory; zero 1 to 3) | all (the parameters too;
            zero 3).
        deepspeed: DeepSpeed settings by its own names, merged over the generated ones.
    """

    weight_decay: Annotated[float, Range(0, 1000)] = 1e-2
    clip: Annotated[float, Range(0, None, "low")] = 1.0
    graph_rate: Annotated[float, Range(0, 1000, "low")] = 10.0
    shares_every: Annotated[int, Range(0)] = 50
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine == "torch" and self._asks_for_deepspeed:
            raise ValueError(
                "zero, offload and deepspeed are settings of engine: deepspeed; set it, or leave "
                "them out"
            )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero < least:
            raise ValueError(
                f"offload: {self.offload} needs zero {least} or more, and zero is {self.zero}"
            )

    @property
    def _asks_for_deepspeed(self) -> bool:
        return bool(self.zero or self.deepspeed or self.offload != "none")

    @property
    def uses_deepspeed(self) -> bool:
        """Which engine ``auto`` means."""
        return self.engine == "deepspeed" or (self.engine == "auto" and self._asks_for_deepspeed)
