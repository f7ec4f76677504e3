"""`metawrap report`: folders of runs -> one HTML file, and pictures on request."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from metawrap.report import draw_report_pictures, gather, write_report_page


def write_report(arguments: Namespace) -> None:
    """Writes the page and the pictures, and prints their paths."""
    groups = gather([Path(run) for run in arguments.runs])
    page = Path(arguments.out) if arguments.out is not None else Path(arguments.runs[0]) / "report.html"
    write_report_page(groups, page)
    print(f"Report: {page}")
    if arguments.png is not None:
        for path in draw_report_pictures(groups, Path(arguments.png)):
            print(f"Picture: {path}")
