"""A recipe: the settings of a published experiment, the recipe that it extends, and the published accuracy.

A file names the recipe that it `extends`, and then only its differences. `title`, `published`, `deviation`, `source`
and `runs` belong to the file itself; the recipes that extend it inherit everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metawrap.errors import ArgumentError
from metawrap.recipes.fields import by_field, split, typed
from metawrap.recipes.yaml_file import Given, read_mapping
from metawrap.settings.keywords import flattened, nearest, nested
from metawrap.training.run_settings import METHODS, RunSettings, nearest_method

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
# The keys of a recipe besides the settings of its run.
_RECIPE_KEYS: dict[str, Any] = {
    "extends": str,
    "title": str,
    "published": float,
    "deviation": float,
    "source": str,
    "seeds": list[int],
    "runs": list[str],
}


@dataclass(frozen=True)
class Recipe:
    """One experiment, or a study of several.

    name: of a packaged recipe, or the path of a file. title: a short description; None for a base of other recipes.
    published: the published accuracy in percent. deviation: its published ± in percent. source: of these two.
    seeds: one run per seed; None for one run. given: fields of the run and keywords of the method by name, inherited
    ones included, each with its place. runs: the recipes of a study, with the study's own settings applied.

    >>> load_recipe("omniglot-20way-1shot-mamlpp").settings().ways
    20
    """

    name: str
    title: str | None = None
    published: float | None = None
    deviation: float | None = None
    source: str | None = None
    extends: str | None = None
    seeds: tuple[int, ...] | None = None
    given: Mapping[str, Given] = field(default_factory=dict)
    runs: tuple[Recipe, ...] = ()

    def settings(self, changes: Mapping[str, Given] | None = None, start: RunSettings | None = None) -> RunSettings:
        """The settings of the run.

        Args:
            changes: values that override the recipe, by name, as in a recipe.
            start: settings for all that neither gives; the defaults if None.
        Raises:
            ArgumentError: a name that the method lacks, or a value of a wrong type or range, with its place.
        """
        given, start = {**self.given, **by_field(changes or {})}, replace(start or RunSettings(), recipe=self.name)
        run, options = split(given, _method(given, start.method))
        return replace(start, **run, options=nested({**flattened(start.options), **flattened(options)}))


def recipe_names() -> list[str]:
    """The packaged recipes, without those that others only extend."""
    return [name for name in _packaged() if "title" in read_mapping(FOLDER / f"{name}.yaml")]


def load_recipe(name: str) -> Recipe:
    """A packaged recipe by its name, or a file by its path, which ends in .yaml.

    Raises:
        ArgumentError: there is no such recipe, or it or a recipe that it extends has an unknown name or a wrong type.
    """
    recipe = _load(name, ())
    if not recipe.runs:
        recipe.settings()  # `_load` has checked the runs of a study.
    return recipe


def _method(given: Mapping[str, Given], default: str) -> str:
    if "method" not in given:
        return default
    method: str = typed("method", given["method"], str)
    if method not in METHODS:
        close = nearest_method(method)
        fix = f"Did you mean '{close}'?" if close else f"Use one of {', '.join(METHODS)}."
        raise ArgumentError(f"{given['method'].place}: method: there is no '{method}'. {fix}")
    return method


def _load(name: str, seen: tuple[Path, ...], beside: Path | None = None, place: str | None = None) -> Recipe:
    path = _find(name, beside, place)
    if path.resolve() in seen:
        chain = " extends ".join(each.stem for each in [*seen[seen.index(path.resolve()) :], path])
        raise ArgumentError(f"{place}: extends: goes round in a circle ({chain}). Leave it out in one of them.")
    seen = (*seen, path.resolve())
    content = by_field(read_mapping(path))
    about = {key: typed(key, content[key], hint) for key, hint in _RECIPE_KEYS.items() if key in content}
    base = Recipe(name)
    if "extends" in about:
        base = _load(about["extends"], seen, path.parent, content["extends"].place)
        if base.runs:
            raise ArgumentError(
                f"{content['extends'].place}: extends: '{base.name}' is a study. Extend one of its runs."
            )
    seeds = about.pop("seeds", base.seeds)
    if "seeds" in content and (not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0):
        raise ArgumentError(
            f"{content['seeds'].place}: seeds: expected different whole numbers from 0, but got {seeds}."
        )
    own = {key: value for key, value in content.items() if key not in _RECIPE_KEYS}
    given = {**base.given, **own}
    split(own, _method(given, RunSettings().method), also=_RECIPE_KEYS)
    runs = [_load(each, seen, path.parent, content["runs"].place) for each in about.pop("runs", [])]
    if "runs" in content:
        _check_runs(runs, content["runs"].place)
    return Recipe(
        name=str(path) if path.parent != FOLDER else path.stem,
        seeds=None if seeds is None else tuple(seeds),
        given=given,
        runs=tuple(replace(each, given={**each.given, **given}) for each in runs),
        **about,
    )


def _check_runs(runs: list[Recipe], place: str) -> None:
    if len({each.name for each in runs}) != len(runs) or not runs:
        raise ArgumentError(f"{place}: runs: expected different recipes, at least one.")
    if study := next((each for each in runs if each.runs), None):
        raise ArgumentError(f"{place}: runs: '{study.name}' is a study itself. Name its runs.")
    for each in runs:
        each.settings()


def _find(name: str, beside: Path | None, place: str | None) -> Path:
    if name in _packaged():
        return FOLDER / f"{name}.yaml"
    if name.endswith(SUFFIXES):
        return (beside or Path()) / Path(name).expanduser()
    close = nearest(name, recipe_names())
    fix = f"Did you mean '{close}'?" if close else "`metawrap recipes` lists them; a file ends in .yaml."
    raise ArgumentError(f"{place or 'recipe'}: there is no recipe '{name}'. {fix}")


def _packaged() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
