"""Prepared slides behind a bounded cache."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from hibio.artifacts import Artifacts
from hibio.config import ConfigError
from hibio.data.lost_store import reading
from hibio.data.slide import PreparedSlide, prepare_slide
from hibio.data.splits import SlideEntry
from hibio.image_input import ImageInput


class SlideDataset:
    """Slides by index; at most ``cache`` of them are held, so memory does not grow with the corpus.

    Args:
        entries: the slides, in order.
        artifacts: fitted on training slides.
        image: how an image is read; a stored feature key or ``patches`` as they are; None: not
            (see :func:`prepare_slide`).
        cache: slides kept in memory.
        shuffle_pairs: give every spot the image of another spot of its slide (the control that
            shows what is learned from pairing; METHOD section 6).

    Asking for a slide whose store has vanished or is damaged is a `DataError` that names it.
    """

    def __init__(
        self,
        entries: Sequence[SlideEntry],
        artifacts: Artifacts,
        image: ImageInput | str | None,
        cache: int = 64,
        shuffle_pairs: bool = False,
    ) -> None:
        self.entries = tuple(entries)
        self.artifacts = artifacts
        self.image = image
        self.cache = cache
        self.shuffle_pairs = shuffle_pairs
        self._slides: OrderedDict[int, PreparedSlide] = OrderedDict()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PreparedSlide:
        if index in self._slides:
            self._slides.move_to_end(index)
            return self._slides[index]
        entry = self.entries[index]
        with reading(entry.path, entry.slide_id):
            slide = prepare_slide(entry.path, self.artifacts, self.image)
        if self.shuffle_pairs:
            slide = shuffled_pairs(slide, seed=index)
        self._slides[index] = slide
        while len(self._slides) > self.cache:
            self._slides.popitem(last=False)
        return slide


def shuffled_pairs(slide: PreparedSlide, seed: int) -> PreparedSlide:
    """The slide with its image features permuted over its spots.

    Raises:
        ConfigError: the slide is read as patches; the control exists for stored features.
    """
    if slide.use_patches:
        raise ConfigError("data.shuffle_pairs needs stored features; set data.image to a key")
    if slide.features_SF is None:
        return slide
    order = np.random.default_rng([seed, slide.n_spots]).permutation(slide.n_spots)
    return dataclasses.replace(slide, features_SF=slide.features_SF[order])
