"""The keywords of a constructor by name, those of its groups as "group.field", and the nearest one to a wrong name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin

from typing_extensions import Unpack, get_type_hints, is_typeddict

from metawrap.errors import ArgumentError, shown
from metawrap.settings.groups import GROUPS
from metawrap.settings.validated import check_value, field_types

Constructor = TypeVar("Constructor", bound=Callable[..., None])
# Names of 0.1 that no part of a name of today resembles.
_ALSO = {"inner_optimizer": "inner_update.rule"}


@dataclass(frozen=True)
class Takes:
    """The fields of a group that a method takes, where it does not take all."""

    fields: tuple[str, ...]


@cache
def keyword_types(taker: Any) -> Mapping[str, Any]:
    """The type of each keyword of a TypedDict, or of a class's constructor with those behind its `**keywords`.

    A group is there as itself and as "group.field" for each field that is taken.
    """
    if is_typeddict(taker):
        found = get_type_hints(taker, include_extras=True)
        return found | {dotted: hint for name, each in found.items() for dotted, hint in _fields_of(name, each)}
    hints = get_type_hints(taker.__init__, include_extras=True)
    names = inspect.signature(taker.__init__).parameters
    found = {name: hints[name] for name in names if name in hints and name not in ("model", "keywords")}
    if get_origin(hints.get("keywords")) is Unpack:
        found |= keyword_types(get_args(hints["keywords"])[0])
    return found


def _fields_of(name: str, hint: Any) -> list[tuple[str, Any]]:
    if name not in GROUPS:
        return []
    taken = [mark.fields for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Takes)]
    own = field_types(GROUPS[name])
    return [(f"{name}.{field}", own[field]) for field in (taken[0] if taken else own)]


def plain_keywords(taker: Any) -> dict[str, Any]:
    """The same without the groups themselves: one name for each value."""
    return {name: hint for name, hint in keyword_types(taker).items() if name not in GROUPS}


def shows(keywords: type) -> Callable[[Constructor], Constructor]:
    """Gives a constructor the signature that `**keywords: Unpack[...]` hides from `help` and `inspect.signature`."""

    def mark(constructor: Constructor) -> Constructor:
        own = [p for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_bare(hint))
            for name, hint in get_type_hints(keywords).items()
        ]
        constructor.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        return constructor

    return mark


def checked(constructor: Constructor) -> Constructor:
    """Checks a constructor's own keywords against their types, before it runs, and keeps their values in `self.own`.

    Raises:
        ArgumentError: a value of the wrong type or range; names it.
    """

    @wraps(constructor)
    def init(self: Any, model: Any, **given: Any) -> None:
        hints = _hints_of(constructor)
        for name, value in given.items():
            if name in hints:
                check_value(name, value, hints[name])
        own = inspect.signature(constructor).parameters.values()
        self.own = {each.name: given.get(each.name, each.default) for each in own if each.kind is each.KEYWORD_ONLY}
        constructor(self, model, **given)

    return init  # type: ignore[return-value]


@cache
def _hints_of(constructor: Any) -> Mapping[str, Any]:
    return get_type_hints(constructor, include_extras=True)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with the fields of a group by "group.field"; a group is one of its objects, or a dict.

    Raises:
        ArgumentError: a group is neither.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in GROUPS:
            found |= {f"{name}.{field}": each for field, each in _given_in(name, value).items()}
        else:
            found[name] = value
    return found


def _given_in(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, GROUPS[name]):
        return {field: getattr(value, field) for field in sorted(value.given)}
    if isinstance(value, Mapping) and all(isinstance(field, str) for field in value):
        return value
    raise ArgumentError(
        f"{name}: expected {GROUPS[name].__name__} or a dict of its fields, but got {type(value).__name__} "
        f"{shown(value)}."
    )


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with "group.field" as dicts in dicts: what `flattened` undoes."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, field = name.partition(".")
        if dot:
            found.setdefault(group, {})[field] = value
        else:
            found[name] = value
    return found


def refuse_unknown(
    caller: str, given: Mapping[str, Any], known: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> None:
    """Raises TypeError, as Python does, for a keyword or a field that is not known; names the nearest one.

    Args:
        caller: the class that was called. given: as `flattened` makes it. known: as `keyword_types` has them.
        others: names that might have been meant, besides those.
    """
    for name in given:
        if name not in known:
            group, _, field = name.rpartition(".")
            what = f"'{field}' in {group}=" if group in known else f"'{name}'"
            candidates = {**known, **(others or {})}
            near = nearest(field, [each for each in candidates if "." in each or group not in known])
            hint = f" Did you mean {_in_python(near)}?" if near else ""
            raise TypeError(f"{caller}() got an unexpected keyword argument {what}.{hint}")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like it, or has it as a part, where a field may go without its group's name."""
    spelled = {old: now for old, now in _ALSO.items() if now in known}
    for each in sorted(known, key=lambda each: each.count("."), reverse=True):
        group, _, field = each.rpartition(".")
        spelled[each] = each
        if group == "inner_update":
            spelled[f"inner_{field}"] = each
        elif group:
            spelled[field] = each
    alike = get_close_matches(name, sorted(spelled), 1) or sorted((each for each in known if name in each), key=len)
    return spelled.get(alike[0], alike[0]) if alike else None


def _in_python(name: str) -> str:
    group, _, field = name.rpartition(".")
    return f'{group}={{"{field}": ...}}' if group else f"'{name}'"
