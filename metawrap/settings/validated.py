"""Frozen dataclasses that check types and bounds when they are made, and the types that their fields have.

A field states its default, its bound and its help text once. pydantic checks; `explained` turns its errors into
`ArgumentError`, and is the only place that does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache, wraps
from textwrap import fill as fill_text
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform, get_type_hints

from metawrap.errors import ArgumentError, printable, shown

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Expected:
    """The words of an error for what a type expects."""

    words: str


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _whole_or_infinite(value: Any) -> Any:
    if value != math.inf and not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        raise ValueError("neither a whole number nor infinite")
    return value


MOST = 2**31 - 1  # of what is counted
LARGEST = 3.4e38  # of single precision
LARGEST_SEED = 2**63 - 1  # of torch, with a sign

Switch = Annotated[bool, Expected("True or False")]
Count = Annotated[int, Field(ge=1, le=MOST), Expected("a whole number of at least 1")]
CountOrNone = Annotated[Annotated[int, Field(ge=1, le=MOST)] | None, Expected("a whole number of at least 1, or None")]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED), Expected("a whole number of at least 0")]
Several = Annotated[int, Field(ge=2, le=MOST), Expected("a whole number of at least 2")]
Whole = Annotated[int, Field(ge=0, le=MOST), Expected("a whole number of at least 0")]
WholeOrNone = Annotated[Annotated[int, Field(ge=0, le=MOST)] | None, Expected("a whole number of at least 0, or None")]
WholeOrInfinite = Annotated[
    float, PlainValidator(_whole_or_infinite), Expected("a whole number of at least 0, or math.inf")
]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST), Expected("a finite number")]
Positive = Annotated[float, Field(gt=0, le=LARGEST), Expected("a positive number")]
PositiveOrNone = Annotated[Annotated[float, Field(gt=0, le=LARGEST)] | None, Expected("a positive number or None")]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST), Expected("a number of at least 0")]
Share = Annotated[float, Field(ge=0, le=1), Expected("a number of at least 0 and at most 1")]
Fraction = Annotated[float, Field(ge=0, lt=1), Expected("a number from 0 up to, not including, 1")]
Betas = Annotated[
    tuple[Fraction, Fraction], BeforeValidator(_list_as_tuple), Expected("two numbers from 0 up to, not including, 1")
]
Workers = Annotated[
    Annotated[int, Field(ge=1, le=MOST)] | Literal["auto"], Expected('a whole number of at least 1, or "auto"')
]


class Options:
    """Base of the validated dataclasses.

    keyword: the keyword of a learner that takes this group; "" for the settings as a whole. given: the fields that the
    caller named, which decide over combinations that have no effect.
    """

    keyword: ClassVar[str] = ""
    given: frozenset[str]

    def check_together(self) -> None:
        """Raises ArgumentError where two fields do not go together."""

    def named(self, field: str) -> str:
        """The field as an error names it: "execution.workers"."""
        return f"{self.keyword}.{field}".lstrip(".")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def validated(cls: type[T]) -> type[T]:
    """A frozen dataclass of a subclass of `Options`, with keywords alone, whose docstring lists the fields.

    Raises, when one is made:
        ArgumentError: a value of the wrong type, range or combination. TypeError: an unknown field.
    """
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=STRICT)
    names = [field.name for field in fields(made)]
    described, fill = made.__pydantic_fields__, made.__init__

    @wraps(fill)
    def checked(self: Any, **values: Any) -> None:
        if unknown := [name for name in values if name not in names]:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument '{unknown[0]}'. It has {', '.join(names)}."
            )
        try:
            fill(self, **{name: plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise explained(error, type(self), values) from None
        if len(values) == len(names):  # As from dataclasses.replace, which hands on every field.
            values = {name: value for name, value in values.items() if value != described[name].default}
        object.__setattr__(self, "given", frozenset(values))
        self.check_together()

    made.__init__ = checked
    if made.keyword:
        lines = [f"{name}: {described[name].description}" for name in names]
        helps = [fill_text(line, 100, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines]
        made.__doc__ = "\n".join([f"{cls.__doc__}".rstrip(), "", "    Args:", *helps])
    return made  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """A number of numpy as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def field_types(cls: type) -> Mapping[str, Any]:
    """The type of each field, with its bounds."""
    key: Any = cls
    return _field_types(key)


@cache
def _field_types(cls: Any) -> Mapping[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def explained(error: ValidationError, cls: type[Options], values: Mapping[str, Any]) -> ArgumentError:
    """pydantic's error about a field of a class that was given these values, in metawrap's words."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    place = f"{cls.keyword}.{name}".lstrip(".")
    return ArgumentError(f"{place}: {refusal(field_types(cls)[name], values[name], dict(first))}")


def in_words(error: ValidationError) -> str:
    """The first of pydantic's complaints about a file, with its place there."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return printable(f"{f'{place}: ' if place else ''}{first['msg'][:200]}")


def refusal(hint: Any, value: Any, error: Mapping[str, Any] | None = None) -> str:
    """ "expected a positive number, but got 0"."""
    words = expected(hint) or str((error or {}).get("msg", "another value")).removeprefix("Input should be ")
    bounds = (error or {}).get("ctx", {})
    if (most := bounds.get("le")) in (MOST, LARGEST, LARGEST_SEED) or bounds.get("ge") == -LARGEST:
        words = f"a number of at most {most:,}" if most else f"a number of at least {-LARGEST}"
    return f"expected {words}, but got {shown(value, 200)}."


def expected(hint: Any) -> str | None:
    """The words for what a type expects; None where it has none. None as a value means the default, and is left out."""
    if get_origin(hint) is Annotated:
        found = [mark.words for mark in hint.__metadata__ if isinstance(mark, Expected)]
        return found[0] if found else expected(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        parts = [expected(part) for part in get_args(hint) if part is not type(None)]
        return None if None in parts else " or ".join(map(str, parts))
    if get_origin(hint) is Literal:
        *most, last = map(repr, get_args(hint))
        return f"{', '.join(most)} or {last}" if most else last
    return None


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises ArgumentError, beginning with the name, unless the value is of the type and within its bounds."""
    try:
        _adapter(hint).validate_python(plain(value))
    except ValidationError as error:
        raise ArgumentError(f"{name}: {refusal(hint, value, dict(error.errors()[0]))}") from None


@lru_cache(256)
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))
