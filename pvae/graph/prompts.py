"""Prompts: the words that stand for a label, as tokens of one small vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pvae.errors import DeclarationError, near

PADDING = ""
"""Token 0: what shorter prompts end with."""


@dataclass(frozen=True)
class Vocabulary:
    """The words of some texts, in alphabetical order after the padding."""

    words: tuple[str, ...]
    """Every token, the padding first."""
    length: int
    """Tokens of a prompt."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """All words of some texts; prompts are as long as the longest."""
        found = [split(text) for text in texts]
        return cls((PADDING, *sorted({word for words in found for word in words})), max(map(len, found), default=0))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """A text as `length` tokens.

        Raises:
            DeclarationError: a word that is not in the vocabulary, or too many of them.
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
    """Lower-case words and numbers of a text: `T-shirt/top` is t, shirt, top."""
    return re.findall(r"[a-z0-9]+", text.lower())
