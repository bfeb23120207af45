"""What regression peers read of an image: every spot's features, its neighbours, its whole slide.

Shapes: N spots of L slides stacked, F features, k neighbours, B blocks of a slide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.fold import SlideData, stack
from eval.peers.peer import Features
from eval.peers.training import device
from eval.readouts import spatial_blocks, zscore


@dataclass(frozen=True)
class SlideStack:
    """Image side of some slides as tensors on the device of training; no count is read.

    Args:
        feature_NF: z-scored per slide.
        near_Nk: row of each spatial neighbour in the stack, padded with -1.
        place_N2: position, z-scored per slide.
        slide_N: number of the slide.
        block_LBF: mean features of the blocks that a slide is cut into.
        block_place_LB2: mean position of each block.
        filled_LB: whether a block has spots.
    """

    feature_NF: Tensor
    near_Nk: Tensor
    place_N2: Tensor
    slide_N: Tensor
    block_LBF: Tensor
    block_place_LB2: Tensor
    filled_LB: Tensor

    @staticmethod
    def of(slides: Sequence[SlideData], features: Features, side: int = 6) -> "SlideStack":
        """Stack slides; each is cut into side x side blocks of about equally many spots."""
        rows = [np.asarray(features[s.slide_id], np.float32) for s in slides]
        places = [zscore(s.xy_um).astype(np.float32) for s in slides]
        starts = np.cumsum([0, *(s.n_spots for s in slides)])
        near = [
            np.where(s.neighbours >= 0, s.neighbours + start, -1)
            for s, start in zip(slides, starts, strict=False)
        ]
        cut = [
            _blocks(row, place, spatial_blocks(s.xy_um, side), side * side)
            for s, row, place in zip(slides, rows, places, strict=True)
        ]
        number = [np.full(s.n_spots, index) for index, s in enumerate(slides)]
        columns = (stack(rows), stack(near), stack(places), stack(number))
        blocks = [np.stack(parts) for parts in zip(*cut, strict=True)]
        return SlideStack(*(torch.from_numpy(v).to(device()) for v in (*columns, *blocks)))

    @property
    def n_spots(self) -> int:
        """N."""
        return len(self.feature_NF)


def _blocks(
    rows: np.ndarray, places: np.ndarray, block: np.ndarray, n_blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean features (B, F), mean position (B, 2) and whether there is any spot (B,)."""
    size = np.bincount(block, minlength=n_blocks)
    share = np.zeros((n_blocks, len(rows)), np.float32)
    share[block, np.arange(len(rows))] = 1.0 / size[block]
    return share @ rows, share @ places, size > 0
