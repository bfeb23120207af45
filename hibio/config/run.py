"""The configuration of a training run: every section, joined."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hibio.config.data import GenesConfig, PathwaysConfig, RegionsConfig
from hibio.config.model import PATCHES, ModelConfig
from hibio.config.schema import Range, Share
from hibio.config.training import ObjectiveConfig, OptimConfig, SamplerConfig, StageConfig
from hibio.keys import MAIN

#: Keys of ``data`` that say where things lie and how work is done; they decide no number.
UNSETTLED_DATA = ("stores", "cache_slides", "prefetch")


@dataclass(frozen=True)
class AugmentConfig:
    """How patches are changed while training; a spot's context patch is changed with it.

    Attributes:
        turns: quarter turns and flips.
        stain: spread of the amounts of each stain (standard deviation of their logarithm); 0.05
            is light, 0.2 strong, 0 leaves them.
    """

    turns: bool = False
    stain: Share = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return self.turns or self.stain > 0


@dataclass(frozen=True)
class DataConfig:
    """Where the stores are and how an image is read.

    Attributes:
        stores: folder of ``<slide_id>.h5``.
        image: stored feature key, ``patches`` (timm tower), or null for counts only.
        shuffle_pairs: the control that gives every spot another spot's image.
        cache_slides: prepared slides kept in memory.
        train_patients: train on so many patients only, for learning curves: the first ones by
            name that are not held out, so that a larger number contains a smaller; null for all.
        prefetch: batches read ahead in another thread; 0 reads each when it is its turn.
        augment: see :class:`AugmentConfig`; of image: patches.
        test: slides that are never trained on, beside those whose manifest says role ``test``;
            they may be of a patient whose other slides are trained on. ``--test`` sets it.
    """

    stores: Path
    image: str | None = "handcrafted"
    shuffle_pairs: bool = False
    cache_slides: Annotated[int, Range(1)] = 64
    train_patients: Annotated[int, Range(1)] | None = None
    prefetch: Annotated[int, Range(0, 10_000)] = 2
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.augment.active and self.image != PATCHES:
            raise ValueError(
                f"augment changes patches, and image is {self.image!r}, whose features are stored; "
                f"set image: {PATCHES}, or leave augment out"
            )


@dataclass(frozen=True)
class LogConfig:
    """Where the numbers of every step go.

    Attributes:
        to: jsonl (``log.jsonl`` of the job, which resumes, grids and reports read, so it is always
            among them) | tensorboard | wandb | mlflow (``pip install "hibio[tracking]"``; their
            own environment variables say where, e.g. WANDB_PROJECT, MLFLOW_TRACKING_URI).
    """

    to: tuple[Literal["jsonl", "tensorboard", "wandb", "mlflow"], ...] = ("jsonl",)

    def __post_init__(self) -> None:
        if "jsonl" not in self.to:
            raise ValueError(
                f"to is {list(self.to)}; keep jsonl beside them, which resumes and reports read"
            )


@dataclass(frozen=True)
class RunConfig:
    """A training run: every variant on every fold with every seed.

    Attributes:
        out: run folder; each job writes ``<variant>/fold-<fold>/seed-<seed>`` below it.
        data: see :class:`DataConfig`.
        folds: held-out patients ("A", "P1+P2"), ``each`` for every patient with an image, or
            ``none`` to train on all.
        seeds: one job each.
        variants: name -> settings that differ from the main run, for baselines trained by the
            same code ("flat_clip", "shuffled"). The main run is called ``hibio``.
        genes, pathways, sampler, regions, model, objective, optim: see their classes.
        stages: one after the other.
        curriculum: blind (every stage stays) | judged: a rehearsal on fewer slides, as long as the
            training itself, says of each stage after the first contrast of spots whether it stays,
            is mixed with the weights before it, or is left out (docs/method.md 5).
        device: auto | cpu | cuda.
        threads: CPU threads of torch and of the fit before the first step, where each of them
            holds one slide; null leaves torch's default (in the fit at most 8). 1 does not suffer
            from other work.
        checkpoint_every: steps between checkpoints.
        bank: write the reference bank at the end.
        log: see :class:`LogConfig`.
        variant: name of this job's variant (filled in by :func:`expand`).
    """

    out: Path
    data: DataConfig
    stages: tuple[StageConfig, ...]
    folds: tuple[str, ...] = ("each",)
    seeds: tuple[Annotated[int, Range(0, 2**32 - 1)], ...] = (0,)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    genes: GenesConfig = field(default_factory=GenesConfig)
    pathways: PathwaysConfig = field(default_factory=PathwaysConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    regions: RegionsConfig = field(default_factory=RegionsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Range(1, 1024)] | None = None
    checkpoint_every: Annotated[int, Range(1)] = 100
    bank: bool = True
    log: LogConfig = field(default_factory=LogConfig)
    curriculum: Literal["blind", "judged"] = "blind"
    variant: str = MAIN

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty; give at least one stage")
        if not self.folds or not self.seeds:
            raise ValueError("folds and seeds need at least one entry each")
        for name, given in ("folds", self.folds), ("seeds", self.seeds):
            twice = [one for one in given if given.count(one) > 1]
            if twice:
                raise ValueError(f"{name} has {twice[0]!r} twice; each is one job, so give it once")
        self.model.vision.image_input(self.data.image)  # refuses what stored features cannot be
        self.model.vision.require_weights()
        names = [stage.name for stage in self.stages]
        if self.curriculum == "judged" and len(set(names)) < len(names):
            raise ValueError(f"curriculum: judged needs stages of different names, not {names}")
