"""HTML as a parser sees it: tags, words, and the text of each element. Refuses a tag that closes another."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"br", "img", "input", "link", "meta"}


class HtmlPage(HTMLParser):
    """tags: each with its attributes. words: all texts but those of scripts and `code`. texts: all texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.words: list[str] = []
        self._own: list[list[str]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._own.append([])
        if tag not in VOID:
            self._open.append(len(self.tags) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open:
            self._own[self._open[-1]].append(data)
        if not self._open or self.tags[self._open[-1]][0] not in ("script", "code"):
            self.words.append(data)

    @property
    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def attributes(self, name: str, tag: str | None = None) -> list[str | None]:
        """The values of an attribute, of all tags or of those with one name."""
        return [attributes[name] for each, attributes in self.tags if name in attributes and tag in (None, each)]

    def elements(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """The attributes and the own text of each element with this name."""
        found = zip(self.tags, self._own, strict=True)
        return [(attributes, "".join(own)) for (name, attributes), own in found if name == tag]
