"""A patient's outcome and the niche that carries it.

The niche is compact tissue, clusters 200-400 um wide, in which two programmes are raised together
that no domain raises together. It takes the share ``outcome_effect`` of the tissue of patients with
outcome 1, and a quarter of that of the others, with a log-normal difference between patients.

Legend: S spots, P programmes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.simulate.config import SimulateConfig, random_stream
from preprocessing.simulate.layout import PITCH_UM, Lattice
from preprocessing.simulate.programmes import Programmes

RAISE = 2.5
_OTHERS = 0.25
_PATIENT_SD = 0.3
_MOST = 0.5
_WIDTH_UM = (200.0, 400.0)


@dataclass(frozen=True)
class Outcomes:
    """Outcome and niche of every patient.

    Attributes:
        outcome: (patients,) 0 or 1, half and half (one more 0 where the number is odd).
        share: (patients,) share of the spots that the niche takes.
        pair: The two programmes that the niche raises by `RAISE`, by position.
    """

    outcome: NDArray[np.int64]
    share: NDArray[np.float64]
    pair: tuple[int, int]

    def niche(self, rng: np.random.Generator, lattice: Lattice, patient: int) -> NDArray[np.bool_]:
        """(S,) which spots of a slide are in the niche: the given share, in whole clusters.

        Clusters are added at random places until the share is reached; the last is cut to fit.
        """
        xy = lattice.spots_um
        inside = np.zeros(len(xy), dtype=bool)
        missing = round(self.share[patient] * len(xy))
        while missing > 0:
            centre = xy[rng.choice(np.flatnonzero(~inside))]
            reach = rng.uniform(*_WIDTH_UM) / 2
            apart = np.hypot(*(xy - centre).T)
            free = np.flatnonzero(~inside & (apart <= max(reach, PITCH_UM)))
            chosen = free[np.argsort(apart[free], kind="stable")][:missing]
            inside[chosen] = True
            missing -= len(chosen)
        return inside

    def raised(
        self, activity: NDArray[np.float64], niche: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Activity (S, P) with the pair raised in the niche."""
        changed = activity.copy()
        for programme in self.pair:
            changed[niche, programme] += RAISE
        return changed


def draw_outcomes(programmes: Programmes, config: SimulateConfig) -> Outcomes:
    """The outcome of each patient, drawn whatever the effect, and the niche share that follows.

    The pair are the two programmes whose domain effects are the most opposed.
    """
    rng = random_stream(config.seed, "outcome")
    outcome = rng.permutation(np.arange(config.n_patients) % 2)
    between = np.exp(_PATIENT_SD * rng.standard_normal(config.n_patients))
    share = config.outcome_effect * np.where(outcome == 1, 1.0, _OTHERS) * between
    together = np.corrcoef(programmes.domain_effect.T)
    first, second = np.unravel_index(np.argmin(together), together.shape)
    pair = (int(first), int(second))
    return Outcomes(outcome.astype(np.int64), np.minimum(share, _MOST), pair)
