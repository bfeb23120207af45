"""The report: results.json and figures as one self-contained HTML file."""

from eval.report.report import write_report

__all__ = ["write_report"]
