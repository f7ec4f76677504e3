"""One line for a call that has to be refused, and why."""

from __future__ import annotations

from typing import Any

import pytest


def refuses(error: type[Exception], words: str, function: Any, *arguments: Any, **options: Any) -> None:
    """The call raises this error, and its text holds the words (a regular expression)."""
    with pytest.raises(error, match=words):
        function(*arguments, **options)
