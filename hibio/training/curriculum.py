"""A curriculum that cannot harm: each stage is judged on slides that its weights never saw.

A job with ``curriculum: judged`` is trained twice. In the rehearsal an inner patient (a block of
one slide where only one patient has images) is held out, and after every stage that follows
the first contrast of spots the weights before it, those after it and their mean retrieve its spots.
The job itself then trains on all its slides and follows the verdicts: a stage that was undone is
left out, one that was mixed ends in the mean of the weights before and after. What is fitted from
counts before the first step is the job's own in both, so the inner slides took part in it; it is
the same for the weights that are compared.

Legend: S spots, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hibio.config.files import ConfigError
from hibio.config.training import StageConfig
from hibio.data.dataset import PreparedSlides
from hibio.data.slide import PreparedSlide
from hibio.data.splits import SlideEntry
from hibio.keys import TERM_SPOT
from hibio.model import HiBio

#: A stage stays only where it gains more than this: two seeds differ by as much (R@10%).
NOISE = 0.01
TENTH = 0.1  # of the spots of a slide, the list in which a pair counts as found
BLOCK = 0.2  # of the spots of a slide, held out where only one patient has images
PLACES = 5  # of the block along the slide; the seed says which

Outcome = Literal["kept", "mixed", "undone"]


@dataclass(frozen=True)
class Verdict:
    """What became of a stage.

    Attributes:
        stage: its name.
        outcome: kept | mixed (mean of the weights before and after) | undone.
        before: mean R@10% of both directions on the inner slides with the weights before it.
        mixed: with the mean of both.
        after: with the weights after it.
        judged_on: the inner patient, or slide and block.
    """

    stage: str
    outcome: Outcome
    before: float
    mixed: float
    after: float
    judged_on: str

    @staticmethod
    def of(stage: str, scores: Sequence[float], judged_on: str) -> Verdict:
        """The better of mixed and after, where it gains more than `NOISE`; else undone.

        ``scores`` are those before, mixed and after.
        """
        before, mixed, after = scores
        outcome: Outcome = "undone"
        if max(mixed, after) > before + NOISE:
            outcome = "kept" if after >= mixed else "mixed"
        return Verdict(stage, outcome, before, mixed, after, judged_on)

    def plain(self) -> dict[str, Any]:
        """As a checkpoint and results.json hold it; ``Verdict(**plain)`` gives it back."""
        return asdict(self)

    def __str__(self) -> str:
        scores = f"before {self.before:.3f}, mixed {self.mixed:.3f}, after {self.after:.3f}"
        return f"stage {self.stage!r} {self.outcome}: R@10% {scores} on {self.judged_on}"


def judged_stages(stages: Sequence[StageConfig]) -> range:
    """Numbers of the stages that are judged: those after the first contrast of spots."""
    contrasts = [number for number, stage in enumerate(stages) if TERM_SPOT in stage.active]
    return range(contrasts[0] + 1, len(stages)) if contrasts else range(0)


def followed(stages: Sequence[StageConfig], verdicts: Sequence[Verdict]) -> list[StageConfig]:
    """The stages that are trained: all but those that were undone."""
    undone = {verdict.stage for verdict in verdicts if verdict.outcome == "undone"}
    return [stage for stage in stages if stage.name not in undone]


@dataclass(frozen=True)
class Inner:
    """What a rehearsal holds out.

    Attributes:
        name: of the patient, or of the slide and block.
        entries: its slides with images.
        block: of a single slide, the spots (S,) that are judged; None for all of whole slides.
        hidden: the same and the spots round them, which take no part in training.
    """

    name: str
    entries: tuple[SlideEntry, ...]
    block: np.ndarray | None = None
    hidden: np.ndarray | None = None

    def others(self, entries: Sequence[SlideEntry]) -> tuple[SlideEntry, ...]:
        """The slides that a rehearsal trains on: those of other patients, or all beside a block."""
        if self.hidden is not None:
            return tuple(entries)
        held_out = {entry.patient_id for entry in self.entries}
        return tuple(entry for entry in entries if entry.patient_id not in held_out)

    def hidden_in(self, entries: Sequence[SlideEntry]) -> dict[int, np.ndarray]:
        """Slide of the training -> its spots (S,) that are in no batch."""
        return {
            i: self.hidden
            for i, e in enumerate(entries)
            if self.hidden is not None and e in self.entries
        }


def hold_out(
    entries: Sequence[SlideEntry],
    seed: int,
    halo: int,
    prepared: Callable[[SlideEntry], PreparedSlide],
) -> Inner:
    """One of the patients with images, another one by the next seed; a block where there is one.

    Args:
        entries: training slides.
        seed: of the job.
        halo: hops of context round a spot in training.
        prepared: gives a slide.

    Raises:
        ConfigError: no training slide has an image.
    """
    pictured = [entry for entry in entries if entry.has_image]
    if not pictured:
        raise ConfigError(
            "curriculum: judged needs training slides with images, and there is none; set it to "
            "blind, or hold out another patient"
        )
    patients = sorted({entry.patient_id for entry in pictured})
    if len(patients) > 1:
        name = patients[seed % len(patients)]
        return Inner(f"patient {name}", tuple(e for e in pictured if e.patient_id == name))
    largest = max(pictured, key=lambda entry: entry.n_spots)
    return inner_block(largest, prepared(largest), halo, seed)


def inner_block(entry: SlideEntry, slide: PreparedSlide, halo: int, seed: int) -> Inner:
    """A strip of a slide across its longer side, and a margin wider than what its spots read.

    Args:
        entry: of the slide.
        slide: prepared.
        halo: hops of context round a spot in training.
        seed: of the job; says where the strip lies.
    """
    xy_um = slide.xy_um - slide.xy_um.mean(axis=0)
    along = xy_um[:, int(np.ptp(xy_um, axis=0).argmax())]
    size = max(1, round(BLOCK * slide.n_spots))
    start = (slide.n_spots - size) * (seed % PLACES) // (PLACES - 1)
    block = np.zeros(slide.n_spots, dtype=bool)
    block[np.argsort(along, kind="stable")[start : start + size]] = True
    hidden = block.copy()
    for _ in range(halo + 1):
        near = np.where(slide.neighbour_SN >= 0, hidden[slide.neighbour_SN], False)
        hidden |= near.any(axis=1)
    return Inner(f"{int(block.sum())} spots of {entry.slide_id}", (entry,), block, hidden)


class Judge:
    """Scores weights on what a rehearsal holds out.

    Args:
        inner: what that is.
        slides: its slides, with true pairs.
    """

    def __init__(self, inner: Inner, slides: PreparedSlides) -> None:
        self.inner = inner
        self.slides = slides

    def score(self, model: HiBio) -> float:
        """Mean over slides and both directions of R@10% within the slide."""
        found = []
        for number in range(len(self.slides)):
            embedding = model.encode_slide(self.slides[number])
            assert embedding.image is not None
            assert embedding.omics is not None
            rows = slice(None) if self.inner.block is None else self.inner.block
            image_SD, omics_SD = embedding.image[rows], embedding.omics[rows]
            found.append((found_pairs(image_SD, omics_SD) + found_pairs(omics_SD, image_SD)) / 2)
        return float(np.mean(found))


def found_pairs(query_SD: np.ndarray, item_SD: np.ndarray, tile: int = 1024) -> float:
    """Share of unit queries whose own item is among the nearest tenth; ties count as before it."""
    n_spots = len(query_SD)
    length = max(1, round(TENTH * n_spots))
    found = 0
    for start in range(0, n_spots, tile):
        cosine = query_SD[start : start + tile] @ item_SD.T
        own = cosine[np.arange(len(cosine)), start + np.arange(len(cosine))]
        found += int(((cosine >= own[:, None]).sum(axis=1) <= length).sum())
    return found / n_spots


def mean_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two states of one module; what is not a float (a counter) is of the second."""
    return {
        name: torch.lerp(one[name], value, 0.5) if value.is_floating_point() else value
        for name, value in other.items()
    }
