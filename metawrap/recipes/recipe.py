"""A recipe: the settings of a published experiment, what they are based on, and what was published.

A file says what it `extends`, and then only what is different there. Its own are `title`, `published`, `deviation`,
`source` and `runs`; all else is handed on to those that extend it.
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
from metawrap.training.run_settings import METHODS, RunSettings

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
# The keys of a recipe besides the settings of its run.
_ABOUT: dict[str, Any] = {
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

    name: of a packaged recipe, or the path of a file. title: what is run; None for a base that others extend.
    published: accuracy in percent. deviation: what the source gives with ±, in percent. source: of these two.
    seeds: a run each; None for one run. given: fields of the run and keywords of the method by name, of all that it
    extends, and where each was given. runs: the recipes of a study, with what the study says already in them.
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
        """The settings of its run.

        Args:
            changes: what wins over the recipe, by name, as in a recipe.
            start: what holds where neither says anything; the defaults if None.
        Raises:
            ArgumentError: a name that the method does not have, or a value of the wrong type or range, with its place.
        """
        return settings_of({**self.given, **by_field(changes or {})}, replace(start or RunSettings(), recipe=self.name))


def recipe_names() -> list[str]:
    """The packaged recipes, without those that are only there to be extended."""
    return [name for name in _packaged() if "title" in read_mapping(FOLDER / f"{name}.yaml")]


def load_recipe(name: str) -> Recipe:
    """A packaged recipe by its name, or a file by its path, which ends in .yaml.

    Raises:
        ArgumentError: there is none, or something in it, or in what it extends, is unknown or of the wrong type.
    """
    recipe = _load(name, ())
    if recipe.runs:
        return recipe
    recipe.settings()
    return recipe


def settings_of(given: Mapping[str, Given], start: RunSettings) -> RunSettings:
    """`start` with what is given in the place of its settings.

    Raises:
        ArgumentError: as `Recipe.settings`.
    """
    run, options = split(given, _method(given, start.method))
    try:
        return replace(start, **run, options=nested({**flattened(start.options), **flattened(options)}))
    except ArgumentError as error:  # Out of range; the text begins with the field.
        place = given[name].place if (name := str(error).partition(":")[0]) in given else ""
        raise ArgumentError(f"{place}: {error}" if place else str(error)) from error


def _method(given: Mapping[str, Given], default: str) -> str:
    if "method" not in given:
        return default
    method: str = typed("method", given["method"], str)
    if method not in METHODS:
        close = nearest(method, METHODS)
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
    about = {key: typed(key, content[key], hint) for key, hint in _ABOUT.items() if key in content}
    base = Recipe(name)
    if "extends" in about:
        base = _load(about["extends"], seen, path.parent, content["extends"].place)
        if base.runs:
            raise ArgumentError(
                f"{content['extends'].place}: extends: '{base.name}' is a study. Extend one of its runs."
            )
    seeds = _seeds(content["seeds"]) if "seeds" in content else base.seeds
    own = {key: value for key, value in content.items() if key not in _ABOUT}
    given = {**base.given, **own}
    split(own, _method(given, RunSettings().method), also=_ABOUT)
    runs = [_load(each, seen, path.parent, content["runs"].place) for each in about.pop("runs", [])]
    if "runs" in content:
        _check_runs(runs, content["runs"].place)
    about.pop("seeds", None)
    return Recipe(
        name=str(path) if path.parent != FOLDER else path.stem,
        seeds=seeds,
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


def _seeds(given: Given) -> tuple[int, ...]:
    seeds = given.value
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ArgumentError(f"{given.place}: seeds: expected different whole numbers from 0, but got {seeds}.")
    return tuple(seeds)


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
