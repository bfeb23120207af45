"""The region trees of the training slides: built, rebuilt from embeddings, followed by identity.

Legend: S spots of a slide, L levels, T rebuilds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hibio.data.dataset import SlideDataset
from hibio.model import HiBio
from hibio.regions import match_labels
from hibio.slide_regions import RegionsConfig, slide_regions


class RegionState:
    """Regions of every training slide and how they got there.

    Args:
        config: see :class:`RegionsConfig`.
        dataset: training slides.
    """

    def __init__(self, config: RegionsConfig, dataset: SlideDataset) -> None:
        self.config = config
        self.dataset = dataset
        self.history: dict[int, list[np.ndarray]] = {}

    def current(self, slide: int) -> np.ndarray:
        """Regions (L, S) of a slide; its first tree is built when first asked for."""
        if slide not in self.history:
            self.history[slide] = [slide_regions(self.dataset[slide], None, self.config)]
        return self.history[slide][-1]

    def sampling(self, slides: Iterable[int]) -> dict[int, np.ndarray]:
        """Regions that batches are made of: the middle level of each slide."""
        middle = len(self.config.diameters_um) // 2
        return {slide: self.current(slide)[middle] for slide in slides}

    def rebuild(self, model: HiBio, slides: Iterable[int]) -> None:
        """New trees from the current embeddings; regions keep their id by overlap."""
        for index in slides:
            previous = self.current(index)
            slide = self.dataset[index]
            new = slide_regions(slide, model.encode_slide(slide), self.config)
            matched = [match_labels(old, now) for old, now in zip(previous, new, strict=True)]
            self.history[index].append(np.stack(matched))

    def state(self) -> dict[str, Tensor]:
        """History of every slide by id, int32 (T, L, S)."""
        return {
            self.dataset.entries[slide].slide_id: torch.from_numpy(
                np.stack(rebuilds).astype(np.int32)
            )
            for slide, rebuilds in self.history.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`."""
        index = {entry.slide_id: i for i, entry in enumerate(self.dataset.entries)}
        self.history = {
            index[slide_id]: list(rebuilds.numpy().astype(np.int64))
            for slide_id, rebuilds in state.items()
        }
