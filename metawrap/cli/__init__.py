"""The command line: flags to calls."""

from metawrap.cli.commands import main

__all__ = ["main"]
