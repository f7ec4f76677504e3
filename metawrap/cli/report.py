"""`metawrap report`: folders of runs -> one HTML file, and pictures where they are asked for."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metawrap.report import draw_report_pictures, gather, write_report_page


def add_report(commands: Any, formatter: Any, add_terminal_flags: Callable[[Any], None]) -> None:
    """Adds the command to the parser's commands."""
    parser = commands.add_parser(
        "report",
        help="show what runs have learned, in one HTML file",
        usage="metawrap report RUN [RUN ...] [options]",
        epilog="Runs that differ in their seed alone are drawn as one; a run that still trains, as far as it is.",
        formatter_class=formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of such (seeds, a comparison)"
    )
    parser.add_argument("--out", default=None, metavar="FILE", help="the page (report.html in the first run's folder)")
    parser.add_argument("--png", default=None, metavar="DIR", help="also draw the main figures, as report-*.png there")
    add_terminal_flags(parser)


def write_report(arguments: Namespace) -> None:
    """Writes the page and prints where it is."""
    groups = gather([Path(run) for run in arguments.runs])
    page = Path(arguments.out) if arguments.out is not None else Path(arguments.runs[0]) / "report.html"
    write_report_page(groups, page)
    print(f"Report: {page}")
    if arguments.png is not None:
        for path in draw_report_pictures(groups, Path(arguments.png)):
            print(f"Picture: {path}")
