"""The report: results.json and figures as one self-contained HTML file."""

from eval.report.gallery import gallery as pictures
from eval.report.report import write_report

__all__ = ["pictures", "write_report"]
