"""Flags of the command line -> settings of a run: a recipe, overridden by `--set` and by flags."""

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
from metawrap.training.named_model import check_model_is_named
from metawrap.training.run_settings import FREE_ON_RESUME, METHODS, RunSettings

_NAMED_OTHERWISE = {"tasks_per_batch": "--batch", "iterations_per_epoch": "--iterations"}


def recipe_in(arguments: Namespace) -> Recipe | None:
    """The recipe that `--recipe` names."""
    return load_recipe(arguments.recipe) if "recipe" in arguments else None


def settings_in(arguments: Namespace, start: RunSettings | None = None, recipe: Recipe | None = None) -> RunSettings:
    """The settings that the user asked for.

    Args:
        start: settings for all that is not given: the defaults, or those of the resumed run.
        recipe: a recipe that overrides `start`; flags and `--set` override the recipe.
    Raises:
        ArgumentError: an unknown name, a wrong type or range, a setting that is given twice, or a network of the user's
            that `start` or `recipe` names, and no flag.
    """
    settings = _settings_in(arguments, start, recipe)
    if not is_given(arguments, "model"):
        check_model_is_named(settings.model, None, f"the {'run' if recipe is None else 'recipe'}")
    return settings


def _settings_in(arguments: Namespace, start: RunSettings | None, recipe: Recipe | None) -> RunSettings:
    flags = flags_in(arguments)
    sets = by_field({name: Given(value, f"--set {name}={value}") for name, value in _sets(arguments)})
    if twice := sorted(flags.keys() & sets.keys()):
        raise ArgumentError(
            f"{sets[twice[0]].place}: {twice[0]}: is also given by a flag, as {flags[twice[0]]}. Leave out one of them."
        )
    if recipe is not None:
        flagged = {name: Given(value, flag_of(name)) for name, value in flags.items()}
        return recipe.settings(sets | flagged, start)
    run = {name: typed(name, each, RUN_FIELDS[name]) for name, each in sets.items() if name in RUN_FIELDS}
    # Other names are keywords of the method, which refuses the unknown ones.
    options = {name: each.value for name, each in sets.items() if name not in RUN_FIELDS}
    start = start or RunSettings()
    try:
        return replace(start, **run, **flags, options=nested({**flattened(start.options), **options}))
    except ArgumentError as error:
        if (name := str(error).partition(":")[0]) in _NAMED_OTHERWISE and name in flags:
            raise ArgumentError(f"{flag_of(name)}: {error}") from error
        raise


def flag_of(name: str) -> str:
    """The flag of `metawrap train` that sets this setting."""
    return _NAMED_OTHERWISE.get(name, f"--{name.replace('_', '-')}")


def flags_in(arguments: Namespace) -> dict[str, Any]:
    """The settings that were given as flags. The parser leaves out the others."""
    names = {each.name for each in fields(RunSettings)} - {"options", "recipe"}
    return {name: value for name, value in vars(arguments).items() if name in names}


def is_given(arguments: Namespace, name: str) -> bool:
    """Whether a flag or `--set` gives the setting."""
    return name in flags_in(arguments) or name in dict(_sets(arguments))


def starts_a_run(arguments: Namespace) -> bool:
    """Whether the command has a setting that a new run could be meant by, in place of the stored settings of a run."""
    # A run that is resumed needs its network named again.
    given = {*flags_in(arguments), *dict(_sets(arguments))} - FREE_ON_RESUME - {"model"}
    return bool(given) or "recipe" in arguments or arguments.seeds is not None


def out_in(arguments: Namespace) -> Path:
    """The folder of the run: `--out`, else a folder in `runs` named by the recipe or by task and method."""
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
