"""Recipes for a reader: the list as a table, and one of them with every field and where each is from."""

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
from metawrap.training.tables import render_table


def recipe_table() -> str:
    """A line for each packaged recipe."""
    recipes = list(map(load_recipe, recipe_names()))
    rows = [[recipe.name, recipe.title or "", published(recipe)] for recipe in recipes]
    header = ["recipe", "what", "published"]
    # All to the left: the intervals, where there are any, stand behind the numbers.
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(3)]
    aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    hint = "Accuracy in percent. With every setting: metawrap recipes NAME. To run it: metawrap train --recipe NAME"
    return f"{render_table(aligned[0], aligned[1:])}\n\n{hint}"


def recipe_text(recipe: Recipe) -> str:
    """The recipe with nothing left to look up: YAML that is itself a recipe; behind each value, where it is from."""
    about = {
        "title": recipe.title,
        "published": recipe.published,
        "deviation": recipe.deviation,
        "source": recipe.source,
        "runs": [each.name for each in recipe.runs] or None,
        "seeds": list(recipe.seeds) if recipe.seeds else None,
    }
    lines = [f"# metawrap train --recipe {recipe.name}"]
    lines += [f"{name}: {_written(value)}" for name, value in about.items() if value is not None]
    if recipe.runs:
        return "\n".join(
            [*lines, "", "# Each of its runs:", *(f"#   metawrap recipes {each.name}" for each in recipe.runs)]
        )
    return "\n".join([*lines, "", *_fields(recipe), *_resolved(recipe.settings())])


def published(recipe: Recipe) -> str:
    """'97.65 ± 0.05', or nothing."""
    if recipe.published is None:
        return ""
    return f"{recipe.published:.2f}" + ("" if recipe.deviation is None else f" ± {recipe.deviation:.2f}")


def _written(value: Any) -> str:
    """As YAML, on one line: JSON is, but for the numbers that it lacks."""
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
    """What the preset and the method's defaults make of what was given, as comments."""
    try:
        # A network of any kind does: what is shown does not depend on it.
        made: Any = build_learner(settings, torch.nn.Linear(1, settings.ways))
    except MetaWrapError:
        return []
    known = {each.name for each in fields(RunSettings)} | set(flattened(settings.options))
    rest = {name: value for name, value in made.settings.as_dict().items() if name not in known or value is None}
    rest |= {name: getattr(made.settings, name) for name in ("norm",) if settings.norm is None}
    lines = [f"#   {name}: {value}" for name, value in rest.items() if value is not None]
    return ["", f"# What {METHODS[settings.method]} makes of it:", *lines]
