"""One YAML mapping -> its values, each with its file and line. Plain values only: no tag, no alias, no key twice.

PyYAML's safe loader takes the last of two equal keys, reads 1e-3 as a word and 2026-01-01 as a date. Here equal keys
are refused, and these two are a number and a word.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metawrap.data.text_files import read_regular
from metawrap.errors import ArgumentError

MAX_BYTES = 2**16  # The longest packaged recipe has 3 kB.


@dataclass(frozen=True)
class Given:
    """A value and the place where it was given, such as 'my.yaml, line 3'."""

    value: Any
    place: str


def read_mapping(path: Path) -> dict[str, Given]:
    """The file's keys in order.

    Raises:
        ArgumentError: the file cannot be read, is no YAML mapping, or has a repeated key, a tag or an alias; names the
            line.
    """
    try:
        loader = _Loader(read_regular(path, MAX_BYTES).decode())
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ArgumentError(f"{path}: expected a recipe of at most {MAX_BYTES // 1024} kB.") from error
        raise ArgumentError(
            f"{path}: cannot be read ({error.strerror}). Name a YAML file, or a packaged recipe."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: is no text file ({_in_one_line(error)}). Save it as UTF-8.") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ArgumentError(f"{path}: expected lines such as 'epochs: 10', but got a list or a single value.")
        content = loader.construct_mapping(node, deep=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ArgumentError(f"{_place(path, mark)}: {error.problem or _in_one_line(error)}.") from error
    except RecursionError as error:
        raise ArgumentError(f"{path}: is nested too deeply for a recipe. Write its fields as 'name: value'.") from error
    except (yaml.YAMLError, ValueError) as error:  # A ValueError: a number with too many digits.
        raise ArgumentError(f"{path}: {_in_one_line(error)}.") from error
    finally:
        loader.dispose()
    return {key.value: Given(content[key.value], _place(path, key.start_mark)) for key, _ in node.value}


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"the alias *{event.anchor} is not allowed; write the value again", event.start_mark)
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise _refused(f"the tag {tag:.60} is not allowed; a recipe holds plain values", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _refused(f"expected the name of a field, but got {str(key.value)[:60]!r}", key.start_mark)
            if key.value in lines:
                raise _refused(f"{key.value}: stands twice, first in line {lines[key.value]}; keep one", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _place(path: Path, mark: Any) -> str:
    return f"{path}, line {mark.line + 1}" if mark else str(path)


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
