"""What a check found: one line per subject, with the remedy."""

from dataclasses import dataclass
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


def failed(findings: list[Finding]) -> bool:
    """Tell whether any finding is a FAIL."""
    return any(finding.level == "FAIL" for finding in findings)
