"""The command line. From top to bottom: commands -> data_check, output, arguments, flags_to_settings."""

from metawrap.cli.commands import main

__all__ = ["main"]
