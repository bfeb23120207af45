"""The region trees of the training slides: built, rebuilt from embeddings, followed by identity.

A slide's first tree follows from its counts, so it is built when it is first asked for and only
some are kept. A rebuilt tree cannot be had again, so the last of every slide is kept, in the
smallest integers that hold it (2 bytes a spot and level), and of the first few slides all of them.

Legend: S spots of a slide, L levels, T rebuilds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hibio.config.data import RegionsConfig
from hibio.data.dataset import PreparedSlides
from hibio.data.slide import PreparedSlide
from hibio.model import HiBio
from hibio.regions import match_labels, slide_regions
from hibio.training.process_group import ProcessGroup

FIRST_TREES = 256  # slides whose first tree is kept; the others are built again when asked for
HISTORY_SLIDES = 16  # slides whose rebuilds are all kept, for figures


class RegionState:
    """Regions of every training slide and how they got there.

    Args:
        config: see :class:`RegionsConfig`.
        dataset: training slides.
        first_trees: slides whose first tree is kept in memory.
        history_slides: the first so many slides of the data set keep every rebuild.
        hidden: slide -> spots (S,) that are in no batch.
    """

    def __init__(
        self,
        config: RegionsConfig,
        dataset: PreparedSlides,
        first_trees: int = FIRST_TREES,
        history_slides: int = HISTORY_SLIDES,
        hidden: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.first_trees = first_trees
        self.history_slides = history_slides
        self.hidden = dict(hidden or {})
        self.rebuilt: dict[int, list[np.ndarray]] = {}
        self._first: OrderedDict[int, np.ndarray] = OrderedDict()

    def current(self, slide: int) -> np.ndarray:
        """Regions (L, S) int64 of a slide; its first tree is built when it is asked for."""
        if slide in self.rebuilt:
            return self.rebuilt[slide][-1].astype(np.int64)
        if slide not in self._first:
            self._first[slide] = _small(self._regions(self.dataset[slide]))
        self._first.move_to_end(slide)
        while len(self._first) > self.first_trees:
            self._first.popitem(last=False)
        return self._first[slide].astype(np.int64)

    def sampling(self, slide: int) -> np.ndarray:
        """Regions (S,) that batches are made of: the middle level of the slide; -1: in none."""
        regions = self.current(slide)[len(self.config.diameters_um) // 2]
        return np.where(self.hidden[slide], -1, regions) if slide in self.hidden else regions

    def rebuild(
        self, model: HiBio, slides: Sequence[int], group: ProcessGroup | None = None
    ) -> None:
        """New trees from the current embeddings; regions keep their id by overlap.

        Args:
            model: whole, on this process.
            slides: to rebuild; processes share them out and tell each other the result.
            group: the processes; this one alone when left out.
        """
        group = group or ProcessGroup()
        for first in range(0, len(slides), group.size):  # one slide a process at a time
            shared = slides[first : first + group.size]
            mine = (
                self._new_regions(model, shared[group.rank]) if group.rank < len(shared) else None
            )
            for owner, index in enumerate(shared):
                shape = (len(self.config.diameters_um), self.dataset.entries[index].n_spots)
                own = mine is not None and owner == group.rank
                new = mine if own else np.zeros(shape, dtype=np.int64)
                self._adopt(index, group.copy_from(owner, torch.from_numpy(new)).numpy())

    def _new_regions(self, model: HiBio, index: int) -> np.ndarray:
        """Regions (L, S) int64 of a slide from its embeddings, named after the current ones."""
        slide = self.dataset[index]
        embedding = model.encode_slide(slide)
        new = self._regions(slide, embedding.omics, embedding.image)
        pairs = zip(self.current(index), new, strict=True)
        return np.stack([match_labels(old, now) for old, now in pairs])

    def _regions(self, slide: PreparedSlide, *embeddings_SD: np.ndarray | None) -> np.ndarray:
        return slide_regions(slide.fused(*embeddings_SD), slide.xy_um, slide.graph, self.config)

    def _adopt(self, index: int, regions: np.ndarray) -> None:
        past: list[np.ndarray] = []
        if index < self.history_slides:
            past = self.rebuilt.get(index) or [_small(self.current(index))]
        self.rebuilt[index] = [*past, _small(regions)]
        self._first.pop(index, None)

    def state(self) -> dict[str, Tensor]:
        """Kept trees of every rebuilt slide by id, int16 or int32 (T, L, S), the last one now."""
        return {
            self.dataset.entries[slide].slide_id: torch.from_numpy(np.stack(trees))
            for slide, trees in self.rebuilt.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`."""
        index = {entry.slide_id: i for i, entry in enumerate(self.dataset.entries)}
        self.rebuilt = {index[slide_id]: list(trees.numpy()) for slide_id, trees in state.items()}
        self._first.clear()


def _small(regions: np.ndarray) -> np.ndarray:
    """The same labels as int16 where they fit, else int32."""
    fits = regions.max(initial=0) <= np.iinfo(np.int16).max
    return regions.astype(np.int16 if fits else np.int32)
