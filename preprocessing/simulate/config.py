"""Settings of the simulated cohort, checked on construction, and its named random streams."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from preprocessing.errors import DataError, did_you_mean

_LIMITS: dict[str, tuple[float, float]] = {
    "n_slides": (1, 10_000),
    "n_patients": (1, 10_000),
    "n_spots": (20, 20_000),
    "n_genes": (50, 60_000),
    "n_programmes": (2, 1_000),
    "n_housekeeping": (0, 5_000),
    "seed": (0, 2**32 - 1),
    "signal": (0.0, 1.0),
    "mpp": (0.2, 4.0),
    "depth": (50.0, 1e6),
    "depth_sd": (0.0, 2.0),
    "depth_shift": (0.0, 2.0),
    "bleed": (0.0, 0.9),
    "dispersion": (0.0, 10.0),
    "effect": (0.0, 3.0),
    "patient_effect": (0.0, 2.0),
    "stain_shift": (0.0, 0.5),
    "outcome_effect": (0.0, 0.4),
    "contiguity": (0.0, 1.0),
    "overlap": (0.0, 0.9),
    "pitch_um": (20.0, 500.0),
    "level_spread": (0.0, 3.0),
    "filler_level": (0.0, 10.0),
    "depth_patient": (0.0, 2.0),
    "texture_shift": (0.0, 1.0),
}
#: Flips and turns of a picture: whether x and y are exchanged, then the signs of x and y.
TURNS: dict[str, tuple[bool, int, int]] = {
    "flip_x": (False, -1, 1),
    "flip_y": (False, 1, -1),
    "rot90": (True, 1, -1),
    "rot180": (False, -1, -1),
    "rot270": (True, -1, 1),
    "transpose": (True, 1, 1),
    "transverse": (True, -1, -1),
}
SHIFTS = (0.5, 20.0)  # pitches
#: Settings at which a cohort is as hard as real sections: HER2ST (its sections with images) and the
#: two of the mouse olfactory bulb; `benchmarks/realism.py` puts them beside each other.
LIKE: dict[str, dict[str, Any]] = {
    "her2st": {
        "n_slides": 6,
        "n_patients": 3,
        "n_spots": 260,
        "n_genes": 12_000,
        "n_programmes": 48,
        "pitch_um": 200.0,
        "mpp": 2.0,
        "depth": 4300.0,
        "depth_sd": 0.7,
        "depth_shift": 0.2,
        "depth_patient": 0.9,
        "level_spread": 0.95,
        "filler_level": 0.2,
        "effect": 0.6,
        "patient_effect": 0.5,
        "stain_shift": 0.5,
        "signal": 0.75,
        "texture_shift": 0.65,
    },
    "mob": {
        "n_slides": 2,
        "n_patients": 2,
        "n_spots": 390,
        "n_genes": 1000,
        "n_programmes": 6,
        "pitch_um": 141.0,
        "mpp": 2.0,
        "depth": 2000.0,
        "depth_sd": 0.43,
        "depth_shift": 0.05,
        "level_spread": 0.8,
        "filler_level": 0.4,
        "dispersion": 0.25,
        "effect": 0.9,
        "patient_effect": 0.05,
        "stain_shift": 0.05,
        "signal": 0.7,
    },
}


@dataclass(frozen=True)
class SimulateConfig:
    """What the cohort looks like; every field is checked against a range on construction.

    Attributes:
        n_slides: Slides, split over patients in consecutive, nearly equal groups.
        n_patients: Patients, at most ``n_slides``.
        n_spots: Spots in tissue per slide (hex lattice).
        n_genes: Genes on the panel: programme genes, housekeeping genes, then fillers.
        n_programmes: Gene programmes planted, drawn from those given.
        n_housekeeping: Genes expressed everywhere at one high level.
        seed: Everything follows from it.
        signal: Share of the image texture's variance that follows the programmes, 0 to 1. At 0
            the texture follows an unrelated tissue layout, so image and counts are independent.
        mpp: Micrometres per level-0 pixel of the slide images.
        depth: Median counts per spot of an average slide.
        depth_sd: Log standard deviation of the depth between spots of one slide.
        depth_shift: Log standard deviation of the depth between slides.
        bleed: Share of a spot's expression that leaks to its six lattice neighbours.
        dispersion: Negative binomial dispersion phi, variance = mean + phi * mean^2; housekeeping
            genes have a tenth of it.
        effect: Mean log fold change of a programme gene per unit (one sd) of activity.
        patient_effect: Log standard deviation of a gene's level between patients.
        stain_shift: Log standard deviation of the stain strengths between slides.
        outcome_effect: Share of the tissue that the niche behind the outcome takes in patients with
            outcome 1; a quarter of it in the others. At 0 the outcome is independent of the tissue.
        contiguity: Share of spots that have the tissue domain of their place; the others exchange
            theirs at random, so that every domain keeps its size. At 0 regions mean nothing.
        overlap: Share of its genes that a programme also takes from the next one; such genes follow
            both, while the gene sets given name them in one only.
        misregister: How the picture of every slide is laid wrongly on its spots: "" (rightly), a
            flip or turn of `TURNS`, "shift:N" (by N pitches in a random direction, N of `SHIFTS`)
            or "other" (the picture of another slide, of another patient where there is one).
        pitch_um: Distance of neighbouring spots; tissue structures keep their micrometres.
        level_spread: Log standard deviation of the average level between genes, housekeeping ones
            left out.
        filler_level: Average level of the fillers, that of programme genes being 1.
        depth_patient: Log standard deviation of the depth between patients.
        texture_shift: Share of the variance of what the texture says of the programmes that it
            says in a way of the patient's own: at 0 pictures are read alike in all patients.
    """

    n_slides: int = 8
    n_patients: int = 4
    n_spots: int = 300
    n_genes: int = 800
    n_programmes: int = 24
    n_housekeeping: int = 80
    seed: int = 0
    signal: float = 0.8
    mpp: float = 1.0
    depth: float = 2500.0
    depth_sd: float = 0.35
    depth_shift: float = 0.3
    bleed: float = 0.1
    dispersion: float = 0.3
    effect: float = 0.8
    patient_effect: float = 0.2
    stain_shift: float = 0.12
    outcome_effect: float = 0.0
    contiguity: float = 1.0
    overlap: float = 0.0
    misregister: str = ""
    pitch_um: float = 100.0
    level_spread: float = 0.6
    filler_level: float = 0.06
    depth_patient: float = 0.0
    texture_shift: float = 0.0

    def __post_init__(self) -> None:
        numbers = [f for f in fields(self) if f.name in _LIMITS]
        problems = [problem for f in numbers if (problem := self._problem(f.name, f.type))]
        if problems:
            raise DataError("cannot simulate: " + "; ".join(problems))
        if self.n_patients > self.n_slides:
            raise DataError(
                f"cannot simulate: n_patients={self.n_patients} but n_slides={self.n_slides}; "
                "every patient needs a slide: lower n_patients or raise n_slides"
            )
        if self.n_housekeeping >= self.n_genes:
            raise DataError(
                f"cannot simulate: n_housekeeping={self.n_housekeeping} leaves no room on a panel "
                f"of n_genes={self.n_genes}; raise n_genes or lower n_housekeeping"
            )
        self._check_misregister()

    @classmethod
    def like(cls, name: str, **changes: Any) -> Self:
        """The settings of a cohort as hard as real sections (`LIKE`), some of them changed.

        Raises:
            DataError: no such preset, or a setting out of its range.
        """
        if name not in LIKE:
            raise DataError(
                f"cannot simulate a cohort like {name!r}; choose one of {', '.join(LIKE)}"
                f"{did_you_mean(name, list(LIKE))}"
            )
        return cls(**{**LIKE[name], **changes})

    @property
    def shift_pitches(self) -> float:
        """By how many pitches the picture is shifted: N of ``misregister="shift:N"``, else 0."""
        kind, _, number = str(self.misregister).partition(":")
        try:
            return float(number) if kind == "shift" else 0.0
        except ValueError:
            return math.nan

    def _check_misregister(self) -> None:
        fault = self.misregister
        shifted = SHIFTS[0] <= self.shift_pitches <= SHIFTS[1]
        if fault not in ("", "other", *TURNS) and not shifted:
            known = f"{', '.join(TURNS)}, other, or shift:N with N from {SHIFTS[0]} to {SHIFTS[1]}"
            raise DataError(
                f"cannot simulate: misregister={fault!r} is none of {known} (pitches)"
                f"{did_you_mean(str(fault), [*TURNS, 'other'])}"
            )
        if fault == "other" and self.n_slides < 2:
            raise DataError(
                "cannot simulate: misregister='other' takes the picture of another slide, and "
                "n_slides=1; raise n_slides"
            )

    def _problem(self, name: str, annotation: object) -> str:
        value = getattr(self, name)
        whole = annotation in ("int", int)
        number = isinstance(value, int | np.integer | (int if whole else float))
        if isinstance(value, bool) or not number or not math.isfinite(value):
            return f"{name}={value!r} is not {'a whole number' if whole else 'a finite number'}"
        low, high = _LIMITS[name]
        if not low <= value <= high:
            return f"{name}={value!r} is outside {low:g} to {high:g}"
        return ""


def random_stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """An independent generator per purpose and slide, so that one draw never shifts another."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), index])
