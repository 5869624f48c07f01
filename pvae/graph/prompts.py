"""Prompts: the words that describe a label, as tokens of one small vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pvae.errors import DeclarationError, near

PADDING = ""
"""Padding word, token 0, that fills prompts shorter than the longest."""


@dataclass(frozen=True)
class Vocabulary:
    """Word-level vocabulary of a set of prompts: the padding word, then all words in alphabetical order."""

    words: tuple[str, ...]
    """Word of every token, the padding word first."""
    length: int
    """Number of tokens of every encoded prompt."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """Return the vocabulary of some texts; its prompt length is that of the longest text."""
        found = [split(text) for text in texts]
        return cls((PADDING, *sorted({word for words in found for word in words})), max(map(len, found), default=0))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text, padded to `length`.

        Raises:
            DeclarationError: a word is not in the vocabulary, or the text has more than `length` words.
        """
        found = split(text)
        for word in found:
            if word not in self.words:
                known = ", ".join(self.words[1:])
                raise DeclarationError(f"prompt: expected words among {known}; got {word!r}{near(word, self.words)}.")
        if len(found) > self.length:
            raise DeclarationError(f"prompt: expected at most {self.length} words; got {len(found)} in {text[:60]!r}.")
        return [self.words.index(word) for word in found] + [0] * (self.length - len(found))


def split(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text: `T-shirt/top` gives t, shirt, top."""
    return re.findall(r"[a-z0-9]+", text.lower())
