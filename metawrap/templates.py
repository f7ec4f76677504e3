"""Jinja templates -> HTML: the one place where text becomes markup. Every value is escaped unless it is `Markup`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


def fill_template(package: str, name: str, **values: object) -> str:
    """The template file `name` of a package, filled with values. Values are escaped; `| tojson` writes strict JSON.

    An unknown name in the template is an error, and so is a NaN in JSON.
    """
    return _template(package, name).render(values).strip()


def packaged_text(package: str, name: str) -> str:
    """The text of a file that is installed with a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


@cache
def _template(package: str, name: str) -> Template:
    from jinja2 import Environment, StrictUndefined  # Imported late: few programs show a page.

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(packaged_text(package, name))
