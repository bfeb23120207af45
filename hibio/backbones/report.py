"""What became of every store when features were extracted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["done", "replaced", "skipped", "no image", "failed"]


@dataclass(frozen=True)
class SlideFeatures:
    """What became of one store.

    Attributes:
        path: the store.
        status: done, replaced (there were features of this encoder with other weights or
            settings), skipped (they are there), no image (nothing to encode), or failed.
        spots: rows of the features.
        dim: length of a feature vector.
        seconds: time spent.
        note: reason of a failure, and what to know of the resolution.
    """

    path: Path
    status: Status
    spots: int = 0
    dim: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class FeaturesReport:
    """The results of one run over a folder, in the order of its stores."""

    encoder: str
    rows: tuple[SlideFeatures, ...]

    @property
    def failed(self) -> tuple[SlideFeatures, ...]:
        """The stores that did not get the features."""
        return tuple(row for row in self.rows if row.status == "failed")

    def __str__(self) -> str:
        """Return a table, one line a store."""
        width = max([len("store"), *(len(row.path.stem) for row in self.rows)])
        lines = [f"{'store':<{width}}  status      spots    dim  seconds  note"]
        lines += [
            f"{r.path.stem:<{width}}  {r.status:<8}  {r.spots:>7}  {r.dim:>5}  {r.seconds:>7.1f}  "
            f"{r.note}".rstrip()
            for r in self.rows
        ]
        return "\n".join(lines)
