"""A slide in tiles for inference: every core spot with all the context its embedding depends on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hibio.batch import SlideBatch
from hibio.data.collate import collate
from hibio.data.slide import PreparedSlide


def iter_tiles(
    slide: PreparedSlide, hops: int, tile_spots: int = 1024
) -> Iterator[tuple[np.ndarray, SlideBatch]]:
    """Core spots of each tile and its batch; memory is set by the tile, not by the slide.

    Spots of a store lie along a space-filling curve, so a run of them is a compact tile.

    Args:
        slide: what to embed.
        hops: halo depth; spatial layers + 1 makes tiled and whole-slide results equal; -1: an
            encoder that reads the whole slide at once, so there is one tile.
        tile_spots: core spots of a tile.
    """
    tile_spots = slide.n_spots if hops < 0 else tile_spots
    no_regions = np.zeros((1, slide.n_spots), dtype=np.int64)
    for start in range(0, slide.n_spots, tile_spots):
        core = np.arange(start, min(start + tile_spots, slide.n_spots))
        yield core, collate([(slide, no_regions, core)], hops)
