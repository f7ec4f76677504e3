"""The command line. From top to bottom: commands -> classify, serve -> sources -> data_check, output -> arguments ->
classifier_arguments -> flags, flags_to_settings.
"""

from metawrap.cli.commands import main

__all__ = ["main"]
