"""The network of a stored run or recipe: its user names it again, because importing a name of a file runs its code."""

from __future__ import annotations

import shlex

from metawrap.errors import ArgumentError, printable, shown
from metawrap.training.run_settings import RunSettings


def check_model_is_named(stored: str | None, given: str | None, where: str) -> None:
    """Raises ArgumentError unless the user gives the name of the network that a file stores: a file may be a
    stranger's, and importing a module runs its code.

    Args:
        stored: `model` in the settings of a run or recipe. given: the same name, from the user. where: the file, in
            words.
    """
    if stored == given:
        return
    if stored is None:
        raise ArgumentError(f"model: {where} has one of metawrap's own networks, but got {shown(given)}. Leave it out.")
    if given is not None:
        raise ArgumentError(f"model: {where} has the network {shown(stored)}, but got {shown(given)}. Name that one.")
    raise ArgumentError(
        f"model: {where} has the network {shown(stored)}, and nothing is imported because a file names it. If that "
        f"code is yours, name it again: --model {shlex.quote(printable(str(stored)))}, or model= in Python."
    )


def model_flag(settings: RunSettings) -> str:
    """The flag that names the network of a run again, for the end of a command; empty for metawrap's own."""
    return "" if settings.model is None else f" --model {shlex.quote(printable(settings.model))}"
