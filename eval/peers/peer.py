"""What a peer is: a published method in small, fitted on the training slides of a fold.

A peer sees `TrainingData` and nothing else while it is fitted; afterwards it turns any slides into
a `Representation`, whose image side is computed from image features and positions alone.

Shapes: S spots of one slide, G genes, F image features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eval.fold import FoldError, Representation, SlideData
from eval.readouts import zscore

#: slide_id -> (S, F) image features, z-scored per slide.
Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TrainingData:
    """Everything that a peer may be fitted on.

    Args:
        genes: (G,) names of the gene vocabulary.
        slides: training slides, with and without an image.
        features: of the training slides with an image; empty when none are stored.
    """

    genes: np.ndarray
    slides: tuple[SlideData, ...]
    features: Features

    def paired(self, peer: str) -> tuple[SlideData, ...]:
        """Training slides with image features.

        Args:
            peer: who asks, for the message.

        Raises:
            FoldError: there is none.
        """
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
        """Embed slides, or predict their expression.

        Args:
            slides: any slides on the vocabulary of the fit.
            features: of those with an image.
        """
        ...


class Peer(Protocol):
    """A method to compare with; a frozen dataclass whose fields are its settings."""

    @property
    def name(self) -> str:
        """Row name in the results."""
        ...

    @property
    def source(self) -> str:
        """The paper that it follows."""
        ...

    @property
    def needs_image(self) -> bool:
        """Whether it is left out of data without image features."""
        ...

    @property
    def seeded(self) -> bool:
        """Whether its fit depends on the seed; one that does not is fitted once a fold."""
        ...

    @property
    def per_slide(self) -> bool:
        """Whether every slide gets a space of its own, so that only its domains can be scored."""
        ...

    def fit(self, data: TrainingData, seed: int) -> FittedPeer:
        """Fit on training slides."""
        ...


def standardised(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stored features (S, F) z-scored per slide, float32: the image input of every peer."""
    return {name: zscore(rows).astype(np.float32) for name, rows in features.items()}


def pictured(slides: Sequence[SlideData], features: Features) -> list[SlideData]:
    """Those slides that have image features, in order."""
    return [slide for slide in slides if slide.slide_id in features]
