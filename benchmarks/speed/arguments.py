"""The flags that `compare` and `gpu` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rivals.cases import CASES
from rivals.contenders import REFERENCE, SETTINGS


def parser_of(description: str | None, usual: Sequence[str], repeats: int = 9) -> argparse.ArgumentParser:
    """A parser with the shared flags; `usual` are the settings that run unless `--only` names others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="all of them if left out")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--only", nargs="+", default=list(usual), choices=list(SETTINGS), help="settings to measure")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try whether it runs: no figures to quote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; the reference always takes part."""
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, but got {args.repeats}")
    args.only = [name for name in SETTINGS if name in {REFERENCE, *args.only}]
    args.out.mkdir(parents=True, exist_ok=True)
    return args
