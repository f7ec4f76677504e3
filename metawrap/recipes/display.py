"""Recipes as text: the table of all, and one recipe with every field and its origin."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from metawrap.errors import MetaWrapError
from metawrap.recipes.recipe import Recipe, load_recipe, recipe_names
from metawrap.settings.keywords import flattened
from metawrap.training.experiment import build_learner
from metawrap.training.run_settings import METHODS, RunSettings


def recipe_table() -> str:
    """Every packaged recipe with its published accuracy, under a title that several may share; 80 columns wide."""
    by_title: dict[str, list[Recipe]] = {}
    for each in map(load_recipe, recipe_names()):
        by_title.setdefault(each.title or "", []).append(each)
    width = max(map(len, recipe_names()))
    lines = [
        "\n".join([title, *(f"  {each.name.ljust(width)}  {published(each)}".rstrip() for each in recipes)])
        for title, recipes in by_title.items()
    ]
    hint = "Every setting of one: metawrap recipes NAME\nTo run one: metawrap train --recipe NAME"
    return "\n\n".join(["Published accuracy in percent:", *lines, hint])


def recipe_text(recipe: Recipe) -> str:
    """The recipe with every setting: YAML that is itself a recipe, with the origin of each value behind it."""
    about = {name: getattr(recipe, name) for name in ("title", "published", "deviation", "source")}
    about |= {"runs": [each.name for each in recipe.runs] or None, "seeds": recipe.seeds and list(recipe.seeds)}
    lines = [f"# metawrap train --recipe {recipe.name}"]
    lines += [f"{name}: {_written(value)}" for name, value in about.items() if value is not None]
    if recipe.runs:
        rest = ["# Each of its runs:", *(f"#   metawrap recipes {each.name}" for each in recipe.runs)]
    else:
        rest = [*_fields(recipe), *_resolved(recipe.settings())]
    return "\n".join([*lines, "", *rest])


def published(recipe: Recipe) -> str:
    """The published accuracy as '97.65 ± 0.05', or an empty text."""
    if recipe.published is None:
        return ""
    return f"{recipe.published:.2f}" + ("" if recipe.deviation is None else f" ± {recipe.deviation:.2f}")


def _written(value: Any) -> str:
    """A value as YAML on one line: as JSON, which lacks only infinity."""
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return json.dumps(value, ensure_ascii=False)


def _fields(recipe: Recipe) -> Iterator[str]:
    settings = recipe.settings()
    values = {each.name: getattr(settings, each.name) for each in fields(RunSettings)}
    values |= flattened(values.pop("options"))
    values.pop("recipe")
    written = {name: f"{name}: {_written(value)}" for name, value in values.items()}
    width = max(map(len, written.values()))
    for name, text in written.items():
        place = recipe.given[name].place.rpartition("/")[2] if name in recipe.given else "default"
        yield f"{text.ljust(width)}  # {place}"


def _resolved(settings: RunSettings) -> list[str]:
    """The settings that the preset and the method's defaults add, as comments."""
    try:
        # Any network serves: the settings do not depend on it.
        made: Any = build_learner(settings, torch.nn.Linear(1, settings.ways))
    except MetaWrapError:
        return []
    known = {each.name for each in fields(RunSettings)} | set(flattened(settings.options))
    rest = {name: value for name, value in made.settings.as_dict().items() if name not in known or value is None}
    if settings.norm is None:
        rest["norm"] = made.settings.norm
    lines = [f"#   {name}: {value}" for name, value in rest.items() if value is not None]
    return ["", f"# Added by {METHODS[settings.method]}:", *lines]
