"""The user's own factory of a network: "package.module:factory" -> nn.Module."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from metawrap.errors import ArgumentError
from metawrap.settings.keywords import nearest


def call_factory(name: str, ways: int | None = None) -> nn.Module:
    """Calls "package.module:factory", with `ways` if it is given and the factory takes it, and returns the network.

    >>> call_factory("torch.nn:Identity", ways=5)
    Identity()

    Raises:
        ArgumentError: there is no such function, it fails or needs other arguments, or it returns no module.
    """
    factory = _find_factory(name)
    given: dict[str, int] = {}
    try:
        signature = inspect.signature(factory)
        given = {"ways": ways} if ways is not None and "ways" in signature.parameters else {}
        signature.bind(**given)
    except TypeError as error:
        raise ArgumentError(
            f"model: '{name}' cannot be called {'with ways alone' if given else 'without arguments'} ({error}). Write "
            f"a function that fills in the rest, such as def build(): return {name.partition(':')[2]}(...)."
        ) from error
    except ValueError:  # A built-in without a signature; the call shows whether it needs arguments.
        pass
    try:
        model = factory(**given)
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            f"model: '{name}' fails when it is called: {in_one_line(error)}. Correct it there; -v shows the line."
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model: '{name}' returned {type(model).__name__}, expected a torch.nn.Module. "
            "Name a function or class that returns the network."
        )
    return model


def _find_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(
            f"model: expected 'package.module:factory', such as 'torchvision.models:resnet18', but got '{name}'."
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # The import runs the user's file; a script may even exit.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        fix = "Correct it there; -v shows the line."
        if missing:
            fix = f"Install '{missing}', or correct the import."
            if f"{module_name}.".startswith(f"{missing}."):
                fix = "Run from the folder that holds it, or install it."
        raise ArgumentError(f"model: cannot import '{module_name}' ({in_one_line(error)}). {fix}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        fix = f" Did you mean '{close}'?" if (close := nearest(attribute, vars(module))) else ""
        raise ArgumentError(f"model: '{module_name}' has no function or class named '{attribute}'.{fix}")
    return factory  # type: ignore[no-any-return]


def in_one_line(error: BaseException) -> str:
    """The kind and the text of an error, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
