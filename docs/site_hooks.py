"""What the site's build does to a page besides rendering it; mkdocs calls these functions."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Names files of the repository that are no pages, in place of linking them.

    `make zoo` writes supported-models.md for the repository, where such links lead somewhere.
    """
    if page.file.src_uri != "supported-models.md":
        return markdown
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Takes out the diagram library that nbconvert loads from elsewhere: the site needs no network."""
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    scripts = re.compile(
        r"<script[^>]*>(?:(?!</script>).)*cdnjs\.cloudflare\.com(?:(?!</script>).)*</script>", re.DOTALL
    )
    return scripts.sub("", output)
