"""What a check found: one line per subject, with the remedy."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Level = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        level: PASS, WARN (usable, look at it) or FAIL (not usable).
        subject: the file, slide or part that was looked at.
        message: what was found.
        fix: what to do; empty for PASS.
    """

    level: Level
    subject: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        """Return the line that ``hibio check`` prints."""
        line = f"{self.level}  {self.subject}: {self.message}"
        return f"{line}. Fix: {self.fix}" if self.fix else line


class SlideWarning(NamedTuple):
    """What may be wrong with a slide that was read: its store keeps it, and every check shows it.

    Attributes:
        message: what was found.
        fix: what to do.
    """

    message: str
    fix: str

    def __str__(self) -> str:
        """Return the words of tables and pages."""
        return f"WARN: {self.message} ({self.fix})"


_DOUBTS: ContextVar[dict[Path, SlideWarning] | None] = ContextVar("doubts", default=None)


@contextmanager
def collected_doubts() -> Iterator[dict[Path, SlideWarning]]:
    """What `doubt` says of the files of one slide while they are read, by file."""
    found: dict[Path, SlideWarning] = {}
    token = _DOUBTS.set(found)
    try:
        yield found
    finally:
        _DOUBTS.reset(token)


def doubt(path: Path, message: str, fix: str) -> None:
    """Warn of a file that is read, once for its slide; where none is read, as Python warns."""
    found = _DOUBTS.get()
    if found is None:
        warnings.warn(f"{path}: {message}; {fix}", stacklevel=2)
    else:
        found.setdefault(path, SlideWarning(f"{path.name}: {message}", fix))


def failed(findings: list[Finding]) -> bool:
    """Tell whether any finding is a FAIL."""
    return any(finding.level == "FAIL" for finding in findings)
