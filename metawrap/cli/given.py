"""What a command line gives -> settings of a run: a recipe, and what wins over it: `--set` and flags."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from metawrap.errors import ArgumentError
from metawrap.recipes import Recipe, load_recipe
from metawrap.recipes.fields import RUN_FIELDS, by_field, typed
from metawrap.recipes.recipe import SUFFIXES
from metawrap.recipes.yaml_file import Given
from metawrap.settings.keywords import flattened, nested
from metawrap.training.run_settings import METHODS, RunSettings


def recipe_in(arguments: Namespace) -> Recipe | None:
    """The recipe that `--recipe` names."""
    return load_recipe(arguments.recipe) if "recipe" in arguments else None


def settings_in(arguments: Namespace, start: RunSettings | None = None, recipe: Recipe | None = None) -> RunSettings:
    """The settings that were asked for.

    Args:
        start: what holds where nothing else is said: the defaults, or those of the run that is resumed.
        recipe: its settings come in the place of those.
    Raises:
        ArgumentError: a name, type or range that is not allowed, or a setting given in two ways.
    """
    sets = by_field({name: Given(value, _as_typed(name, value)) for name, value in _sets(arguments)})
    flags = flags_in(arguments)
    if twice := sorted(flags.keys() & sets.keys()):
        raise ArgumentError(
            f"{sets[twice[0]].place}: {twice[0]}: is also given by a flag, as {flags[twice[0]]}. Leave out one of them."
        )
    if recipe is not None:
        given = sets | {name: Given(value, _flag(name)) for name, value in flags.items()}
        return recipe.settings(given, start)
    run = {name: typed(name, each, RUN_FIELDS[name]) for name, each in sets.items() if name in RUN_FIELDS}
    # Other names are keywords of the method, which tells those that it does not have.
    options = {name: each.value for name, each in sets.items() if name not in RUN_FIELDS}
    start = start or RunSettings()
    return replace(start, **run, **flags, options=nested({**flattened(start.options), **options}))


def flags_in(arguments: Namespace) -> dict[str, Any]:
    """The settings that were given as flags; the parser leaves out the others."""
    given = vars(arguments)
    names = [each.name for each in fields(RunSettings) if each.name not in ("options", "recipe")]
    return {name: given[name] for name in names if name in given}


def is_given(arguments: Namespace, name: str) -> bool:
    """Whether a flag or `--set` says what the setting is."""
    return name in flags_in(arguments) or name in dict(_sets(arguments))


def out_in(arguments: Namespace) -> Path:
    """The folder of the run: --out, or one named by its recipe or by what it does."""
    if arguments.out is not None:
        return Path(arguments.out)
    if "recipe" in arguments:
        name = arguments.recipe
        return Path("runs") / (Path(name).stem if name.endswith(SUFFIXES) else name)
    settings = settings_in(arguments)
    name = f"{Path(settings.data).stem}-{settings.ways}way-{settings.shots}shot-{METHODS[settings.method]}"
    return Path("runs") / name.lower()


def _sets(arguments: Namespace) -> list[tuple[str, Any]]:
    return list(getattr(arguments, "options", []))


def _as_typed(name: str, value: Any) -> str:
    return f"--set {name}={value}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
