"""The names that a recipe and `--set` accept, with their types from RunSettings and from the methods.

A field of a group of keywords is "group.field", or stands in a mapping under the group. pydantic checks types and
bounds strictly: 'true' is no number, and 3 is no switch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

import metawrap.methods as methods
from metawrap.errors import ArgumentError
from metawrap.recipes.yaml_file import Given
from metawrap.settings.groups import GROUPS
from metawrap.settings.keywords import nearest, nested, plain_keywords
from metawrap.settings.validated import expected, field_types
from metawrap.training.experiment import PYTHON_ONLY
from metawrap.training.run_settings import METHODS, RunSettings

# The keywords of the method become `options`, and the name of the file becomes `recipe`.
RUN_FIELDS: dict[str, Any] = {
    name: hint for name, hint in field_types(RunSettings).items() if name not in ("options", "recipe")
}


def split(given: Mapping[str, Given], method: str, also: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the run, and keywords of the method. A name that is both belongs to the run.

    Args:
        given: values by name, as from `by_field`. method: its name on the command line. also: further names to suggest
            for an unknown one.
    Raises:
        ArgumentError: an unknown name, with the nearest known one, or a wrong type; begins with the place.
    """
    keywords = method_keywords(method)
    run: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, each in given.items():
        if name in RUN_FIELDS:
            run[name] = typed(name, each, RUN_FIELDS[name])
        elif name in keywords:
            options[name] = typed(name, each, keywords[name])
        else:
            raise ArgumentError(f"{each.place}: {name}: {_unknown(name, method, {*RUN_FIELDS, *keywords, *also})}")
    return run, nested(options)


def by_field(given: Mapping[str, Given]) -> dict[str, Given]:
    """Splits each group of keywords into its fields, by "group.field", so that each can be overridden alone.

    Raises:
        ArgumentError: a group is no mapping; begins with the place.
    """
    found: dict[str, Given] = {}
    for name, each in given.items():
        if name not in GROUPS:
            found[name] = each
        elif isinstance(each.value, Mapping):
            found |= {f"{name}.{field}": Given(value, each.place) for field, value in each.value.items()}
        else:
            raise ArgumentError(
                f"{each.place}: {name}: expected a mapping of its fields ({', '.join(field_types(GROUPS[name]))}), but "
                f"got {each.value!r:.80}."
            )
    return found


def typed(name: str, given: Given, hint: Any) -> Any:
    """The value, checked against the type as JSON: a list stands for a tuple.

    >>> typed("ways", Given(5, "my.yaml, line 3"), int)
    5

    Raises:
        ArgumentError: the value has another type; begins with the place.
    """
    adapter = _adapter(hint)
    if adapter is None:  # A hint with a function, such as that of `adapt`: the method itself checks the value.
        return given.value
    try:
        adapter.validate_json(json.dumps(given.value))
    except ValidationError as error:
        wanted = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in error.errors())
        words = expected(hint) or " or ".join(wanted)
        raise ArgumentError(f"{given.place}: {name}: expected {words}, but got {given.value!r:.80}.") from error
    return given.value


def method_keywords(method: str) -> dict[str, Any]:
    """The keywords of a method that take plain values and are no settings of the run, with their types."""
    kind = getattr(methods, METHODS[method])
    of_run = {each.name for each in fields(RunSettings)}
    return {name: hint for name, hint in plain_keywords(kind).items() if name not in PYTHON_ONLY | of_run}


def _unknown(name: str, method: str, known: Collection[str]) -> str:
    if name in PYTHON_ONLY:
        return f"takes Python objects, which a run cannot store. Use {METHODS[method]} from Python for it."
    if name == "options":
        return "write the keywords of the method themselves, such as 'msl_epochs: 15'."
    hint = f" Did you mean '{close}'?" if (close := nearest(name, known)) else ""
    return f"is neither a field of a run nor a keyword of {METHODS[method]}.{hint}"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
