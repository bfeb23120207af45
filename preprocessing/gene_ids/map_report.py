"""What became of each gene when genes were mapped: kept, renamed, merged, lost; each counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN = "not in the table"
NO_TARGET = "no such identifier"
AMBIGUOUS = "ambiguous"
SEVERAL = "several orthologs"
REASONS = (UNKNOWN, NO_TARGET, AMBIGUOUS, SEVERAL)
_SHOWN = 5


@dataclass(frozen=True)
class Found:
    """Where a gene goes: its target, or the reason why it is lost."""

    target: str = ""
    reason: str = ""


@dataclass(frozen=True)
class GeneMapReport:
    """What became of each gene: n_in = kept + renamed + lost. Names are sorted.

    Attributes:
        target: the identifiers wanted.
        n_in: G, genes before.
        n_out: H, genes after.
        kept: names that were as wanted.
        renamed: (before, after).
        merged: (after, names before), for every gene made of two or more.
        lost: (reason, names); the reasons are `REASONS`.
        lost_share: share of all counts that lies in the lost genes, 0..1.
    """

    target: str
    n_in: int
    n_out: int
    kept: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    merged: tuple[tuple[str, tuple[str, ...]], ...]
    lost: tuple[tuple[str, tuple[str, ...]], ...]
    lost_share: float

    @property
    def n_lost(self) -> int:
        """Number of genes left out, for any reason."""
        return sum(len(names) for _, names in self.lost)

    def lines(self) -> tuple[str, ...]:
        """Return the report as sentences, the first names with each count."""
        lines = [f"genes mapped to {self.target}: {self.n_in} before, {self.n_out} after"]
        lines.append(_counted("kept", self.kept))
        lines.append(_counted("renamed", [f"{old} -> {new}" for old, new in self.renamed]))
        groups = [f"{' + '.join(old)} -> {new}" for new, old in self.merged]
        lines.append(_counted("summed from several", groups))
        lines += [_counted(f"lost, {reason}", names) for reason, names in self.lost]
        if self.n_lost:
            lines.append(f"genes lost hold {self.lost_share:.2%} of the counts")
        return tuple(line for line in lines if line)

    def __str__(self) -> str:
        """Return the sentences, one a line."""
        return "\n".join(self.lines())


def make_report(
    target: str,
    before: list[str],
    found: list[Found],
    column: np.ndarray,
    order: list[str],
    lost_share: float,
) -> GeneMapReport:
    """Sort genes into kept, renamed, merged and lost.

    Args:
        target: the identifiers wanted.
        before: (G,) names.
        found: (G,) where each goes.
        column: (G,) new column of each, -1: lost.
        order: (H,) new names.
        lost_share: part of the counts in lost genes, 0..1.
    """
    groups: list[list[str]] = [[] for _ in order]
    lost: dict[str, list[str]] = {reason: [] for reason in REASONS}
    for name, one, place in zip(before, found, column.tolist(), strict=True):
        (groups[place] if one.target else lost[one.reason]).append(name)
    pairs = [(old, new) for new, names in zip(order, groups, strict=True) for old in names]
    return GeneMapReport(
        target=target,
        n_in=len(before),
        n_out=len(order),
        kept=tuple(sorted(old for old, new in pairs if old == new)),
        renamed=tuple(sorted((old, new) for old, new in pairs if old != new)),
        merged=tuple(
            sorted(
                (new, tuple(sorted(names)))
                for new, names in zip(order, groups, strict=True)
                if len(names) > 1
            )
        ),
        lost=tuple((reason, tuple(sorted(lost[reason]))) for reason in REASONS if lost[reason]),
        lost_share=lost_share,
    )


def _counted(what: str, names: Sequence[str]) -> str:
    """Return "genes WHAT: N (first names)", or "" for none."""
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"genes {what}: {len(names)} ({', '.join(names[:_SHOWN])}{more})"
