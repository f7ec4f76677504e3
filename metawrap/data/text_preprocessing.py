"""TextPreprocessing: a text -> tokens -> a network's input, the same when a classifier is made and when it is used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metawrap.data.problems import check_int, reading, wrong_argument
from metawrap.errors import ArgumentError, DataError, MetaWrapError, MetaWrapWarning, shown

Tokens = NDArray[np.int64]
_MAX_TOKENS = 2**17
_EXAMPLES = ("a", "a text of several words")


@dataclass(frozen=True)
class TextPreprocessing:
    """The way from a text to a network's input: the ids of its tokens, and a mask that is 0 where a row is padding.

    tokenizer: of the package tokenizers; it pads to the longest text, and cuts texts at max_tokens. max_tokens: the
    most that the network takes, with the marks of start and end.
    """

    kind: ClassVar[str] = "texts"

    tokenizer: Any
    max_tokens: int

    @classmethod
    def of(cls, tokenizer: str, max_tokens: int, padding: tuple[str, int] | None = None) -> TextPreprocessing:
        """The preprocessing of a tokenizer.json.

        Args:
            tokenizer: the content of the file. padding: the token that fills rows up, and its id; that of the file, or
                the token 0, if None.
        Raises:
            MetaWrapError: tokenizers is not installed. DataError: the content is no tokenizer.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MetaWrapError('Texts need tokenizers: pip install "metawrap[texts]".') from error
        check_int("max_tokens", max_tokens, 1)
        if max_tokens > _MAX_TOKENS:
            raise wrong_argument("max_tokens", f"at most {_MAX_TOKENS}", max_tokens)
        with reading("The tokenizer cannot be read", Exception):  # Its errors have no class of their own.
            made = Tokenizer.from_str(tokenizer)
            of_file = made.padding or {}
            token, number = padding or (of_file.get("pad_token", "[PAD]"), of_file.get("pad_id", 0))
            made.enable_padding(pad_token=token, pad_id=number)
            made.enable_truncation(max_tokens)
        return cls(made, max_tokens)

    def prepare(self, text: Any) -> Tokens:
        """The token ids and the mask of a text, (2, tokens). A text that is too long is cut, with a warning.

        Raises:
            ArgumentError: no string. DataError: an empty one, or one with halves of characters.
        """
        if not isinstance(text, str):
            raise wrong_argument("text", "a string", text)
        if not text.strip():
            raise DataError("A text is empty. Leave it out.")
        with reading(f"The text {shown(text)} has bytes that are no characters", UnicodeEncodeError, fix="Correct it."):
            text.encode()
        found = self.tokenizer.encode(text)
        if found.overflowing:
            warnings.warn(
                f"Texts of more than {self.max_tokens} tokens are cut, such as {shown(text)}.",
                MetaWrapWarning,
                stacklevel=2,
            )
        return np.array([found.ids, found.attention_mask], np.int64)

    def stack(self, prepared: Sequence[Any]) -> Tensor:
        """Texts of `prepare` as a program takes them: int64 of shape (texts, 2, tokens), ids and mask."""
        rows = torch.zeros(len(prepared), 2, max((each.shape[1] for each in prepared), default=0), dtype=torch.int64)
        rows[:, 0] = self.tokenizer.padding["pad_id"]
        for row, each in zip(rows, prepared, strict=True):
            row[:, : each.shape[1]] = torch.from_numpy(each)
        return rows

    def inputs(self, prepared: Sequence[Any]) -> Tensor:
        """As `stack`: a network of texts gets what a program gets."""
        return self.stack(prepared)

    def examples(self) -> list[Tokens]:
        """Two texts of different lengths, to try a network on."""
        return [self.prepare(text) for text in _EXAMPLES]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the tokenizer is `tokenizer.to_str()`."""
        return {"max_tokens": self.max_tokens}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], tokenizer: str) -> TextPreprocessing:
        """The preprocessing from the values of `to_dict` and the content of a tokenizer.json.

        Raises:
            ArgumentError: another mapping. DataError: the content is no tokenizer.
        """
        if not isinstance(stored, Mapping) or list(stored) != ["max_tokens"]:
            raise ArgumentError(f"preprocessing: expected max_tokens, but got {shown(stored)}.")
        return cls.of(tokenizer, stored["max_tokens"])
