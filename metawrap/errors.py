"""Every error that metawrap raises on purpose: each names what is wrong, what was expected, and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class MetaWrapError(Exception):
    """Base of all metawrap errors: catch this to catch them all."""


class ArgumentError(MetaWrapError, ValueError):
    """An argument has the wrong type, range or combination."""


class TaskError(MetaWrapError, ValueError):
    """A task or task batch has the wrong shape, device, dtype or labels."""


class UnsupportedModuleError(MetaWrapError, TypeError):
    """The user's module, or one inside it, cannot be adapted correctly; raised before anything is changed."""


class DivergedError(MetaWrapError, RuntimeError):
    """Too many meta-steps in a row had a non-finite meta-gradient; the last good weights are still in place."""


class OutOfMemoryError(MetaWrapError, torch.OutOfMemoryError):
    """One task alone does not fit into memory; the learner is as it was."""


class RankError(MetaWrapError, RuntimeError):
    """Another process that shares the meta-step failed, is gone, or is in another state; none of them was changed."""


class DataError(MetaWrapError, ValueError):
    """A data set, archive or image is missing, broken, too small or unsafe."""


class CheckpointError(MetaWrapError, RuntimeError):
    """A checkpoint is missing, broken, or belongs to another run."""


class MetaWrapWarning(UserWarning):
    """Something is allowed but is known to surprise people; the text says what and how to silence it."""


@contextmanager
def writing(argument: str, path: Path, fix: str = "Name a file in a folder of yours.") -> Iterator[None]:
    """Raises ArgumentError in place of an OSError while a path that the user named is written."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"{argument}: cannot write '{path}' ({error.strerror}). {fix}") from error


def printable(text: str) -> str:
    r"""A text for a terminal: its control and format characters, which could move the cursor, as escapes; but for the
    ends of lines.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any, most: int = 120) -> str:
    """A value as errors show it, in one line: its repr, cut where it is long; the dtype and shape of an array."""
    if is_array(value):
        kind = "tensor" if isinstance(value, torch.Tensor) else type(value).__name__
        return f"a {f'{value.dtype} ' if hasattr(value, 'dtype') else ''}{kind} of shape {tuple(value.shape)}"
    if type(value) in (list, tuple) and len(value) > 10:
        return f"a {type(value).__name__} of {len(value)}: {', '.join(shown(item, 20) for item in value[:10])}, ..."
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_array(value: Any) -> bool:
    """Whether a value is a tensor, an array with an axis, or a table."""
    return isinstance(value, torch.Tensor) or bool(isinstance(getattr(value, "shape", None), tuple) and value.shape)
