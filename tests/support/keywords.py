"""Keywords of learners in one flat dict, for tests that hand options around: `grouped` puts each into its group."""

from __future__ import annotations

from typing import Any

from metawrap.settings.groups import GROUPS
from metawrap.settings.validated import field_types

# "inner_momentum" is inner_update's; the fields of the other groups go by their own name.
PLACES = {
    (f"inner_{field}" if group == "inner_update" else field): (group, field)
    for group, kind in GROUPS.items()
    for field in field_types(kind)
} | {"inner_optimizer": ("inner_update", "rule")}


def grouped(**flat: Any) -> dict[str, Any]:
    """`grouped(workers=2, inner_momentum=0.9)` is {"execution": {"workers": 2}, "inner_update": {"momentum": 0.9}}.

    Names that are no field of a group stay as they are.
    """
    found: dict[str, Any] = {}
    for name, value in flat.items():
        if name in PLACES:
            group, field = PLACES[name]
            found.setdefault(group, {})[field] = value
        else:
            found[name] = value
    return found
