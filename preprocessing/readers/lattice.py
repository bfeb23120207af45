"""Physical scale from the spot array: pixels between neighbouring array positions.

Shapes: S spots; ``array`` is (S, 2) integer array positions, ``xy_px`` (S, 2) pixels.
"""

import numpy as np

VISIUM_PITCH_UM = 100.0
_HEX_STEPS = ((0, 2), (1, 1), (1, -1))
_MIN_PAIRS = 3
_HEX_TOLERANCE = 1.05


def step_lengths(array: np.ndarray, xy_px: np.ndarray, step: tuple[int, int]) -> np.ndarray:
    """Distances in px of all spot pairs whose array positions differ by ``step``.

    Args:
        array: (S, 2) integer array positions, unique.
        xy_px: (S, 2) pixel positions.
        step: difference in array units, such as (0, 1).

    Returns:
        (P,) float64 lengths, one a pair.
    """
    low = array.min(axis=0) - 2
    width = int(array[:, 1].max() - low[1]) + 3
    key = (array[:, 0] - low[0]) * width + (array[:, 1] - low[1])
    order = np.argsort(key)
    wanted = key + step[0] * width + step[1]
    place = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
    found = key[order][place] == wanted
    partner = order[place[found]]
    return np.asarray(np.linalg.norm(xy_px[partner] - xy_px[found], axis=1))


def step_px(array: np.ndarray, xy_px: np.ndarray) -> float | None:
    """Median pixels per array unit of a square grid or a checkerboard.

    Neighbours one unit apart are used; where an array has none (a checkerboard), neighbours two
    units apart count half.

    Returns:
        px per array unit, or None with fewer than three neighbouring pairs.
    """
    for unit in (1, 2):
        lengths = np.concatenate(
            [step_lengths(array, xy_px, step) for step in ((0, unit), (unit, 0))]
        )
        if len(lengths) >= _MIN_PAIRS:
            return float(np.median(lengths)) / unit
    return None


def hex_pitch_px(array: np.ndarray, xy_px: np.ndarray) -> float | None:
    """Centre-to-centre px of a hexagonal Visium lattice, or None when it is not one.

    On Visium arrays row + column is even, and the neighbours at (0, 2), (1, 1) and (1, -1) are
    equally far (within 5 %).
    """
    if ((array.sum(axis=1) % 2) != 0).any():
        return None
    lengths = [step_lengths(array, xy_px, step) for step in _HEX_STEPS]
    if min(map(len, lengths)) < _MIN_PAIRS:
        return None
    medians = [float(np.median(values)) for values in lengths]
    if max(medians) > _HEX_TOLERANCE * min(medians):
        return None
    return float(np.median(np.concatenate(lengths)))
