"""Robust limits: median -+ 3 MAD, for the spots of a slide and for the slides of a cohort."""

import math
from dataclasses import dataclass

import numpy as np

N_MADS = 3.0
NORMAL = 1.4826  # the MAD of a normal distribution times this is its standard deviation
FEWEST = 5  # values; of fewer no one can be called unusual


@dataclass(frozen=True)
class Limits:
    """What is usual: low..high around the median; all NaN where nothing can be said."""

    median: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def below(self, values: np.ndarray) -> np.ndarray:
        """Tell which values lie below; bool like ``values``, False for NaN."""
        return np.asarray(np.asarray(values) < self.low)

    def above(self, values: np.ndarray) -> np.ndarray:
        """Tell which values lie above; bool like ``values``, False for NaN."""
        return np.asarray(np.asarray(values) > self.high)


def robust_limits(
    values: np.ndarray, *, log: bool = False, n_mads: float = N_MADS, least: float = 0.0
) -> Limits:
    """Median -+ ``n_mads`` MAD (times 1.4826) of the finite values.

    Args:
        values: (n,), any unit.
        log: measure on the logarithm (values above 0 only), as for counts, whose spread grows with
            their size.
        n_mads: how far is unusual.
        least: no value nearer to the median than this is unusual, in the unit of the values (of
            the logarithm with ``log``).

    Returns:
        Limits in the unit of the values. Of fewer than 5 values, or where more than half of them
        are equal (MAD 0) and ``least`` is 0, only the median is finite.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if log:
        values = np.log(values[values > 0])
    if len(values) == 0:
        return Limits()
    median = float(np.median(values))
    spread = max(least, n_mads * NORMAL * float(np.median(np.abs(values - median))))
    if len(values) < FEWEST or spread <= 1e-12 * max(1.0, abs(median)):
        spread = math.nan
    found = np.array([median, median - spread, median + spread])
    with np.errstate(over="ignore"):
        return Limits(*(np.exp(found) if log else found).tolist())
