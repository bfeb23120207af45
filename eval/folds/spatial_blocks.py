"""Held-out parts of one slide: spatial blocks with a buffer around them, never random cells.

Neighbouring cells are alike and an encoder with neighbours makes them more so; random cells
would be predicted from the cell beside them. Shapes: S spots.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans

from eval.errors import FoldError
from eval.folds.fold import SlideData
from eval.results import ResultTable
from hibio.config.schema import Folds, Micrometres

REACH_HOPS = 5  # spatial graph hops that an embedding of the default encoder depends on
SEED = 0


@dataclass(frozen=True)
class BlocksConfig:
    """How a slide is cut.

    Args:
        n_blocks: blocks, each held out once.
        buffer_um: training cells closer than this to a held-out cell are left out; None: as far
            as an embedding sees, `reach_um` of the slide.
    """

    n_blocks: Folds = 5
    buffer_um: Micrometres | None = None


@dataclass(frozen=True)
class BlockSplit:
    """One held-out block of a slide.

    Args:
        name: ``block0`` and so on, from left to right.
        block: (S,) block of every cell.
        train: (S,) cells that may be fitted on.
        test: (S,) cells of this block.
        n_left_out: cells of other blocks inside the buffer.
    """

    name: str
    block: np.ndarray
    train: np.ndarray
    test: np.ndarray
    n_left_out: int


def blocks_of(xy_um: np.ndarray, n_blocks: int) -> np.ndarray:
    """Block (S,) of each cell: k-means on the coordinates, numbered from left to right.

    Raises:
        FoldError: fewer different positions than blocks.
    """
    n_places = len(np.unique(xy_um, axis=0))
    if n_blocks < 2 or n_places < n_blocks:
        raise FoldError(
            f"{n_places} different positions cannot be cut into {n_blocks} blocks; at least two "
            "blocks and one position for each are needed"
        )
    means = KMeans(n_blocks, n_init=10, random_state=SEED).fit(np.asarray(xy_um, np.float64))
    order = np.lexsort(means.cluster_centers_.T[::-1])
    number = np.empty(n_blocks, dtype=np.int64)
    number[order] = np.arange(n_blocks)
    return np.asarray(number[means.labels_])


def reach_um(slide: SlideData) -> float:
    """How far an embedding sees: `REACH_HOPS` times the median distance to the last neighbour."""
    present = slide.neighbours >= 0
    away = np.linalg.norm(slide.xy_um[slide.neighbours] - slide.xy_um[:, None], axis=2)
    last = np.where(present, away, 0.0).max(axis=1, initial=0.0)
    return REACH_HOPS * float(np.median(last))


def block_splits(slide: SlideData, config: BlocksConfig, table: ResultTable) -> list[BlockSplit]:
    """Every block of a slide held out once, with its buffer; the cut is noted in the table.

    A slide with fewer different positions than blocks gives none, and a note.
    """
    n_places = len(np.unique(slide.xy_um, axis=0))
    if n_places < config.n_blocks:
        table.note(
            f"slide {slide.slide_id}: {n_places} different positions, too few for "
            f"{config.n_blocks} blocks; left out"
        )
        return []
    buffer = reach_um(slide) if config.buffer_um is None else config.buffer_um
    block = blocks_of(slide.xy_um, config.n_blocks)
    splits = [_split(slide.xy_um, block, number, buffer) for number in range(config.n_blocks)]
    left_out = ", ".join(str(split.n_left_out) for split in splits)
    table.note(
        f"slide {slide.slide_id}: {config.n_blocks} spatial blocks, each held out once; training "
        f"cells closer than {buffer:.0f} um to a held-out cell are left out ({left_out} of "
        f"{slide.n_spots} cells)"
    )
    return splits


def _split(xy_um: np.ndarray, block: np.ndarray, number: int, buffer_um: float) -> BlockSplit:
    test = block == number
    away, _ = cKDTree(xy_um[test]).query(xy_um)
    train = ~test & (away >= buffer_um)
    return BlockSplit(f"block{number}", block, train, test, int((~test & ~train).sum()))
