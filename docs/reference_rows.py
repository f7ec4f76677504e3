"""An extension of griffe for the reference: a row for each keyword, with its type and its default.

The source has `**keywords: Unpack[...]`, groups of keywords that are dataclasses, and descriptions of several names at
once ("support_x, support_y: ..."). Types and defaults are those of the running library.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import griffe
from torch import nn

import metawrap
from metawrap.settings.groups import ExecutionOptions, InnerOptions, OuterOptions, OutputOptions, WrappingOptions
from metawrap.settings.settings import Settings

_GROUPS = (InnerOptions, OuterOptions, ExecutionOptions, OutputOptions, WrappingOptions)
_DEFAULTS = {"loss_fn": "cross_entropy", "engine": "'auto'"}
_SEVERAL = re.compile(r"^( +)((?:\w+, )+\w+): (.*)")


class ReferenceRows(griffe.Extension):
    """mkdocstrings makes one of it; see mkdocs.yml."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Changes what was read of the package, before any page is made."""
        for found in _objects(pkg):
            kind = getattr(metawrap, found.name, None) if found.is_class else None
            if kind in _GROUPS:
                _show_fields(found, kind)
            elif inspect.isclass(kind) and issubclass(getattr(kind, "settings_class", object), Settings):
                _show_keywords(found, kind)
            if found.docstring is not None:
                found.docstring.value = one_row_each(found.docstring.value)


def one_row_each(text: str) -> str:
    """A docstring in which a description of several names comes once for each name.

    >>> one_row_each("Args:\\n    x, y: tensors,\\n        of one task.")
    'Args:\\n    x: tensors,\\n        of one task.\\n    y: tensors,\\n        of one task.'
    """
    lines, done = text.splitlines(), list[str]()
    while lines:
        line = lines.pop(0)
        if (match := _SEVERAL.match(line)) is None:
            done.append(line)
            continue
        rest = []
        while lines and lines[0].startswith(match[1] + " "):
            rest.append(lines.pop(0))
        for name in match[2].split(", "):
            done += [f"{match[1]}{name}: {match[3]}", *rest]
    return "\n".join(done)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    for member in parent.members.values():
        if not member.is_alias:
            yield member
            yield from _objects(member)


def _show_keywords(found: griffe.Object, kind: Any) -> None:
    made = kind(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)))
    known = inspect.signature(kind.__init__).parameters
    rows = []
    for name, parameter in known.items():
        if name == "preset":
            default = repr(kind.default_preset)
        else:
            value = getattr(made.settings, name, parameter.default)
            default = f"{type(value).__name__}()" if isinstance(value, _GROUPS) else repr(value)
        is_own = name in ("self", "model")
        rows.append((name, parameter.annotation, None if is_own else _DEFAULTS.get(name, default)))
    _set(found, rows)


def _show_fields(found: griffe.Object, kind: Any) -> None:
    fields, hints = kind.__pydantic_fields__, get_type_hints(kind)
    known = [(name, hints[name], repr(field.default)) for name, field in fields.items()]
    _set(found, [("self", inspect.Parameter.empty, None), *known])
    rows = "\n".join(f"    {name}: {field.description}" for name, field in fields.items())
    text, _, example = found.docstring.value.partition("\n\n>>>")
    found.docstring.value = f"{text}\n\nArgs:\n{rows}" + (f"\n\n>>>{example}" if example else "")


def _set(found: griffe.Object, rows: list[tuple[str, Any, str | None]]) -> None:
    parameters = [
        griffe.Parameter(
            name,
            kind=griffe.ParameterKind.positional_or_keyword if default is None else griffe.ParameterKind.keyword_only,
            annotation=None if annotation is inspect.Parameter.empty else _short(annotation),
            default=default,
        )
        for name, annotation, default in rows
    ]
    found.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def _short(annotation: Any) -> str:
    """The annotation without the modules of its names, and with `|` in place of Union."""
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_short, get_args(annotation)))
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("Mapping[str, Any]", "dict")
    return text.replace("NoneType", "None")
