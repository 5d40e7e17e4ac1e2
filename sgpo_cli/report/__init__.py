"""The report of a run: one HTML file that needs nothing else. Imported only when a report is written."""

from sgpo_cli.report.page import write

__all__ = ["write"]
