"""How the image of a spot is read: stored features, or patches and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass

from hibio.config import ConfigError
from preprocessing.slide_stain import StainMethod

#: Value of ``data.image`` that reads patches from the store (for a timm tower).
PATCHES = "patches"


@dataclass(frozen=True)
class ImageInput:
    """What a vision tower asks of the data.

    Attributes:
        key: a stored feature key ("handcrafted"), or ``patches``.
        context: read the wider patches of each spot too.
        stain: none | macenko | reinhard: bring the patches of each slide to one stain as they are
            read.

    Raises:
        ConfigError: context or stain of stored features, which nothing can be done to.
    """

    key: str
    context: bool = False
    stain: StainMethod = "none"

    def __post_init__(self) -> None:
        if self.key == PATCHES:
            return
        if self.context:
            raise ConfigError(
                f"model.vision.context is patch, but data.image reads the stored features "
                f"{self.key!r}; set data.image: {PATCHES}, or store features of both scales: hibio "
                "features --scale both"
            )
        if self.stain != "none":
            raise ConfigError(
                f"model.vision.stain is {self.stain}, but data.image reads the stored features "
                f"{self.key!r}, whose patches are past changing; set data.image: {PATCHES}, or "
                f"store features of normalised patches: hibio features --stain {self.stain}"
            )
