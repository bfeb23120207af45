"""What a peer is, how one is trained, and peers as further models of a fold.

A peer sees `TrainingData` and nothing else while it is fitted; afterwards it turns any slides into
a `Representation`, whose image side is computed from image features and positions alone.
Shapes: S spots of one slide, N training items (spots), G genes, F image features.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.errors import FoldError
from eval.folds.fold import (
    Cost,
    Fold,
    Prediction,
    Representation,
    SlideData,
    dense_expression,
    variable_genes,
)
from eval.measures.ridge import zscore
from hibio.config.schema import Count, Positive, Range, Weight
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path

NOT_IMPUTED = "peers are not fitted again without the hidden genes, so they have no row here"
#: Share of training spots in which a target should be detected, as in the expression task.
MIN_DETECTED = 0.1
#: Genes that a regression peer predicts: as many as the largest target set of the expression task.
N_TARGETS = 200
#: slide_id -> (S, F) image features, z-scored per slide.
Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Budget:
    """What a peer may spend: as much as the run that it stands beside.

    Args:
        steps: of the optimiser, in all.
        batch: spots in a step.
    """

    steps: int = 200
    batch: int = 256


@dataclass(frozen=True)
class TrainingData:
    """Everything that a peer may be fitted on.

    Args:
        genes: (G,) names of the gene vocabulary.
        slides: training slides, with and without an image.
        features: of the training slides with an image; empty when none are stored.
        budget: of a peer whose own settings give none.
    """

    genes: np.ndarray
    slides: tuple[SlideData, ...]
    features: Features
    budget: Budget = Budget()

    def paired(self, peer: str) -> tuple[SlideData, ...]:
        """Training slides with image features; FoldError, which names the peer, without any."""
        found = tuple(slide for slide in self.slides if slide.slide_id in self.features)
        if not found:
            raise FoldError(
                f"peer {peer}: none of the {len(self.slides)} training slides has image features; "
                "store some with `hibio features`, or leave the peer out of --peers"
            )
        return found


class FittedPeer(Protocol):
    """A peer after its fit."""

    def represent(self, slides: Sequence[SlideData], features: Features) -> Representation:
        """Embed any slides on the vocabulary of the fit, or predict their expression."""
        ...


class Peer(Protocol):
    """A method to compare with; a frozen dataclass whose fields are its settings.

    ``name`` is its row in the results, ``source`` the paper that it follows. One that
    ``needs_image`` is left out of data without image features; one that is not ``seeded`` is fitted
    once a fold; one that is ``per_slide`` gives every slide a space of its own, so that only its
    domains can be scored.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def needs_image(self) -> bool: ...  # noqa: D102
    @property
    def seeded(self) -> bool: ...  # noqa: D102
    @property
    def per_slide(self) -> bool: ...  # noqa: D102

    def fit(self, data: TrainingData, seed: int) -> FittedPeer:
        """Fit on training slides."""
        ...


def target_genes(slides: Sequence[SlideData], n_genes: int = N_TARGETS) -> np.ndarray:
    """The genes (H,) that predictors are fitted on, those of the expression task."""
    return variable_genes(slides, n_genes, MIN_DETECTED)


def known_expression(slide: SlideData, genes: np.ndarray) -> np.ndarray:
    """Log expression (S, H) float32 of some genes."""
    return dense_expression(slide, genes).astype(np.float32)


def standardised(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stored features (S, F) z-scored per slide, float32: the image input of every peer."""
    return {name: zscore(rows).astype(np.float32) for name, rows in features.items()}


def pictured(slides: Sequence[SlideData], features: Features) -> list[SlideData]:
    """Those slides that have image features, in order."""
    return [slide for slide in slides if slide.slide_id in features]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the loop; there is no early stopping, hence no validation slide to choose.

    Args:
        steps: of the optimiser, over as many epochs as they take; null: as many as the run beside.
        batch: spots in a step, about, at least 2: an epoch is cut into equal parts of at most so
            many; null: as many as in a step of the run beside.
        lr: of AdamW, falling to 0 along a half cosine.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
    """

    steps: Count | None = None
    batch: Annotated[int, Range(2)] | None = None
    lr: Positive = 1e-3
    weight_decay: Weight = 1e-2
    clip: Positive = 5.0

    def __post_init__(self) -> None:
        steps, batch = 1 if self.steps is None else self.steps, self.batch or 2
        if min(steps, self.lr, self.clip) <= 0 or batch < 2 or self.weight_decay < 0:
            raise FoldError(
                f"training of a peer: {self}; steps, lr and clip must be positive, batch 2 or "
                "more, weight_decay 0 or more"
            )

    def within(self, budget: Budget) -> Budget:
        """What is spent: its own settings where it has any."""
        return Budget(self.steps or budget.steps, self.batch or budget.batch)


class FitCost(NamedTuple):
    """Parameters that were fitted, wall time in seconds, and optimiser steps."""

    n_parameters: int
    seconds: float
    steps: int


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws within depend on the seed alone, and torch's own state is put back afterwards."""
    gpus = [0] if torch.cuda.is_available() else []
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)


def fit(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
    n_items: int,
    config: TrainingConfig,
    budget: Budget,
    seed: int,
) -> tuple[nn.Module, FitCost]:
    """Build a module and train it.

    Args:
        build: makes the module; its weights are drawn from the seed.
        loss: of the module on the items with these indices (n,), a scalar.
        n_items: N.
        config: of the loop.
        budget: where ``config`` does not say how long and how many.
        seed: of the weights, the order of the items and dropout.

    Returns:
        The module in evaluation mode, and what it took.

    Raises:
        FoldError: nothing to train on, or the loss is not finite.
    """
    if n_items < 2:
        raise FoldError(f"a peer has {n_items} training spots; at least 2 are needed")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        module = build().to(device())
        trained = [p for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        spent = config.within(budget)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, spent.steps)
        module.train()
        for items in islice(_batches(n_items, spent.batch, generator), spent.steps):
            _step(module, loss(module, items.to(device())), optimiser, trained, config)
            schedule.step()
    n_parameters = sum(p.numel() for p in trained)
    return module.eval(), FitCost(n_parameters, time.perf_counter() - started, spent.steps)


def _batches(n_items: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Items of one step after the other, epoch after epoch; never one alone."""
    while True:
        order = torch.randperm(n_items, generator=generator)
        parts = order.tensor_split(-(-n_items // batch))
        yield from (part for part in parts if len(part) > 1)


def _step(
    module: nn.Module,
    value: Tensor,
    optimiser: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    config: TrainingConfig,
) -> None:
    if not bool(torch.isfinite(value)):
        raise FoldError(
            f"{type(module).__name__}: the training loss is {float(value.detach())}; check the "
            "image features and counts of the training slides"
        )
    optimiser.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(trained, config.clip)
    optimiser.step()


def find_peers(asked: str | Sequence[str], listed: Mapping[str, Peer]) -> tuple[Peer, ...]:
    """The peers that a user asks for.

    Args:
        asked: ``none``, ``all``, or names, as a list or with commas between.
        listed: `eval.peers.PEERS`.

    Raises:
        FoldError: unknown name; the choices and the nearest one are listed.
    """
    names = asked.split(",") if isinstance(asked, str) else list(asked)
    names = [name.strip() for name in names]
    if names in (["none"], []):
        return ()
    if names == ["all"]:
        return tuple(listed.values())
    for name in names:
        if name not in listed:
            raise FoldError(
                f"unknown peer {name!r}; give all, none, or names out of {sorted(listed)}"
                f"{did_you_mean(name, listed)}"
            )
    return tuple(listed[name] for name in dict.fromkeys(names))


def with_peers(
    fold: Fold,
    peers: Sequence[Peer],
    features: Mapping[str, np.ndarray] | None,
    *,
    seedless: bool,
    budget: Budget | None = None,
    kept: Path | None = None,
) -> Fold:
    """The fold with every peer beside its models.

    A fold without training slides (a model trained on every slide) fits peers on those same slides.

    Args:
        fold: what the model is measured on; peers are fitted under its seed.
        peers: which ones.
        features: slide_id -> (S, F) stored image features, or None when there are none.
        seedless: whether to fit those that do not depend on the seed (once a fold is enough).
        budget: of the run that they stand beside; the default of `Budget` without one.
        kept: folder where what each peer made is kept, and read where it is there already.

    Returns:
        The same fold with more ``models`` and, for peers with a space a slide, ``per_slide``.

    Raises:
        FoldError: a peer cannot be fitted; the message names it.
    """
    slides = (*fold.train, *fold.test)
    scaled = standardised(features or {})
    trained_on = fold.train or fold.test
    own = {s.slide_id: scaled[s.slide_id] for s in trained_on if s.slide_id in scaled}
    data = TrainingData(fold.genes, trained_on, own, budget or Budget())
    models: list[Representation] = []
    per_slide: list[Representation] = []
    bar = tqdm(_usable(fold, peers, bool(own), seedless), desc="peers", disable=None, leave=False)
    for peer in bar:
        bar.set_postfix_str(f"fold {fold.name}, seed {fold.seed}, {peer.name}")
        asked = fold.test if peer.per_slide else slides
        path = None if kept is None else kept / f"peer-{peer.name}-{fold.name}-{fold.seed}.npz"
        if path is not None and path.is_file():
            found = _read(path)
        else:
            found = peer.fit(data, fold.seed).represent(asked, scaled)
            if path is not None:
                _write(path, found)
        (per_slide if peer.per_slide else models).append(found)
    hidden = fold.hidden
    if hidden is not None and models:
        hidden = replace(hidden, notes=(*hidden.notes, NOT_IMPUTED))
    return replace(
        fold,
        models=(*fold.models, *models),
        per_slide=(*fold.per_slide, *per_slide),
        hidden=hidden,
    )


def _write(path: Path, found: Representation) -> None:
    """Keep what a fitted peer made of the slides; peers have neither anchors nor region trees."""
    plain = {"name": found.name, "notes": found.notes, "aligned": found.aligned}
    cost = None if found.cost is None else asdict(found.cost)
    arrays: dict[str, Any] = {"told": np.array(json.dumps({**plain, "cost": cost}))}
    own = found.prediction
    if own is not None:
        arrays["genes"] = own.genes
    parts = {"image": found.image, "omics": found.omics, "prediction": own and own.values}
    for part, rows in parts.items():
        arrays |= {f"{part}/{slide}": values for slide, values in (rows or {}).items()}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def _read(path: Path) -> Representation:
    """What `_write` kept.

    Raises:
        FoldError: it cannot be read.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        told = json.loads(str(arrays.pop("told")))
        cost = told.pop("cost")
        parts: dict[str, Any] = {}
        genes = arrays.pop("genes", None)
        for name, values in arrays.items():
            part, _, slide = name.partition("/")
            parts.setdefault(part, {})[slide] = values
        values_of = parts.pop("prediction", None)
        return Representation(
            **{**told, "notes": tuple(told["notes"])},
            **parts,
            prediction=None if values_of is None else Prediction(genes, values_of),
            cost=None if cost is None else Cost(**cost),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BadZipFile) as error:
        raise FoldError(f"{path}: cannot be read ({error}); remove it") from error


def _usable(fold: Fold, peers: Sequence[Peer], pictures: bool, seedless: bool) -> list[Peer]:
    """Peers that this fold can be fitted with; those that need an image it lacks are printed."""
    blind = [peer.name for peer in peers if peer.needs_image and not pictures]
    if blind:
        print(
            f"fold {fold.name}: no training slide has image features; peers left out: "
            f"{', '.join(blind)}"
        )
    return [p for p in peers if p.name not in blind and (p.seeded or seedless)]
