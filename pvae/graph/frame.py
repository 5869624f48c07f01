"""Layout of a row of data: the data point, then covariates and the observed values of latents; vocabularies."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Literal, Self

import torch
from torch import Tensor

from pvae.component import Shape
from pvae.errors import DataError, misdeclared, refuse
from pvae.graph.site import one_hot
from pvae.util import Record, field

PADDING = ""
"""Padding word, token 0, that fills prompts shorter than the longest."""
UNKNOWN = "?"
"""Token 1 of captions, for all words that their vocabulary lacks."""
HASH = 6364136223846793005
"""Odd multiplier (Knuth, The Art of Computer Programming, vol. 2, 3.3.4) of a hash modulo 2^64."""


class Vocabulary(Record):
    """Word-level vocabulary of a set of prompts: the padding word, then all words in alphabetical order."""

    words: tuple[str, ...]
    """Word of every token, the padding word first."""
    length: int
    """Number of tokens of every encoded prompt."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
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
            misdeclared(word not in self.words, "graph.frame.word", words=self.words, word=word)
        misdeclared(len(found) > self.length, "graph.frame.length", most=self.length, found=found, text=text)
        return [self.words.index(word) for word in found] + [0] * (self.length - len(found))


def split(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text: `T-shirt/top` gives t, shirt, top."""
    return re.findall(r"[a-z0-9]+", text.lower())


def word_numbers(words: Sequence[str], length: int) -> list[int]:
    """Return an integer below 2^53 for each of the first `length` words of `split`, then 0, the padding word.

    It is the base-36 number of 1 and `short(word)`: a table of float64 holds words without a vocabulary.

    Example:
        >>> word_numbers(["7", "07"], 3)
        [43, 1303, 0]
    """
    return [int(f"1{short(word)}", 36) if word else 0 for word in words[:length]] + [0] * (length - len(words))


def short(word: str) -> str:
    """Return a word of at most ten characters; of a longer one its first two, and eight digits of a hash of all."""
    return word if len(word) <= 10 else word[:2] + hashlib.sha256(word.encode()).hexdigest()[:8]


class Entry(Record):
    """Numbers of a row beside its data point: a label, real numbers, or the tokens of a prompt.

    Arguments:
        codes: number of categories of a label, or of words of a vocabulary; 0 of real numbers.
        width: number of numbers in a row: 1 of a label, D of a vector, the number of tokens of a prompt.
        vocabulary: vocabulary of a prompt; None for labels and numbers.
        tokens: token sequence of every label, if a prompt stands for each; None if rows have captions of their own.
        ordinal: networks read a label k as a thermometer (k >= 1, .., k >= codes - 1) in place of a one-hot.
        source: what fills it: the "label" of the data, their "side" value of the same name, or the "sum" of x.
        latent: True for observed values of a latent, NaN where unknown: no covariate, which networks read.
        size: True for the sizes of counts, numbers that are not negative.

    Example:
        >>> Entry(codes=3).see(torch.tensor([2.0, 0.0]), torch.zeros(1)).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        >>> Entry(codes=3, ordinal=True).see(torch.tensor([2.0, 0.0]), torch.zeros(1)).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    codes: int = 0
    width: int = 1
    vocabulary: Vocabulary | None = None
    tokens: Sequence[Sequence[int]] | None = None
    ordinal: bool = False
    source: Literal["label", "side", "sum"] = "label"
    latent: bool = False
    size: bool = False

    @property
    def shape(self) -> Shape:
        """Event shape of its numbers: `()` of a label, `(width,)` of others."""
        return () if self.codes and self.vocabulary is None else (self.width,)

    @property
    def features(self) -> Shape:
        """Event shape of what networks read: `(codes,)`, `(codes - 1,)` if ordinal, `(codes, width)` of a prompt."""
        return (self.codes - self.ordinal, *self.shape) if self.codes else self.shape

    def see(self, value: Tensor, like: Tensor) -> Tensor:
        """Return what networks read of values `(..., *shape)`, `(..., *features)`, in the type of `like`."""
        if self.ordinal:
            return (value.unsqueeze(-1) >= torch.arange(1, self.codes, device=value.device)).to(like)
        if not self.codes:
            return value.to(like)
        return one_hot(value, self.codes, like).movedim(-1, -1 - len(self.shape))

    def wrong(self, value: Tensor) -> Tensor:
        """Return True where a value is none that the entry can have: no category, not finite, or missing."""
        wrong = (value != value.round()) | (value < 0) | (value >= self.codes) if self.codes else ~value.isfinite()
        wrong = wrong | (value < 0) if self.size else wrong
        return wrong & ~value.isnan() if self.latent else wrong


class Frame(Record):
    """Layout of a row of data: the data point x, followed by its entries if any are declared.

    A row with entries is one vector: x flattened, then the numbers of each entry.
    """

    x: Shape
    """Event shape of a data point x."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """Entries behind x by name: covariates, and latents of which some rows have the value."""

    @cached_property
    def covariates(self) -> dict[str, Entry]:
        """Entries that are given, by name: all but the observed values of latents."""
        return {name: entry for name, entry in self.entries.items() if not entry.latent}

    @property
    def row(self) -> Shape:
        """Event shape of a row: that of x, or `(prod(x) + sum(widths),)` with entries."""
        return (prod(self.x) + sum(e.width for e in self.entries.values()),) if self.entries else self.x

    @property
    def shapes(self) -> dict[str, Shape]:
        """Event shapes of the covariates as networks read them, by name."""
        return {name: entry.features for name, entry in self.covariates.items()}

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the numbers of all entries of rows `(..., *row)` by name, `(..., *entry.shape)`."""
        if not self.entries:
            return {}
        parts = rows[..., prod(self.x) :].split([entry.width for entry in self.entries.values()], -1)
        found = zip(self.entries.items(), parts, strict=True)
        return {name: part if entry.shape else part.squeeze(-1) for (name, entry), part in found}

    def known(self, rows: Tensor, *, every: bool = True) -> dict[str, Tensor]:
        """Return the known values of latents in rows `(..., *row)` by name, `(..., *entry.shape)`, NaN where unknown.

        With `every` unset, a latent that no row has a value of is left out.
        """
        found = {name: t for name, t in self.columns(rows).items() if self.entries[name].latent}
        return found if every else {name: t for name, t in found.items() if not bool(t.isnan().all())}

    def blank(self, count: int) -> Tensor:
        """Return `count` rows of zeros in which no value of a latent is known."""
        parts = [torch.full((count, e.width), torch.nan if e.latent else 0.0) for e in self.entries.values()]
        return torch.cat([torch.zeros(count, prod(self.x)), *parts], 1) if parts else torch.zeros(count, *self.x)

    def split(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the data points `(..., *x)` of rows `(..., *row)`, and what networks read of the covariates."""
        if not self.entries:
            return rows, {}
        x = rows[..., : prod(self.x)].reshape(*rows.shape[:-1], *self.x)
        return x, self.features(self.columns(rows), rows)

    def features(self, columns: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Return what networks read of the numbers of covariates, by name, in the type of `like`."""
        return {name: self.covariates[name].see(t, like) for name, t in columns.items() if name in self.covariates}

    def join(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return rows `(n, *row)` with their data points replaced by `x` `(n, *x)` and their entries kept."""
        return torch.cat([x.reshape(len(rows), -1).to(rows), rows[:, prod(self.x) :]], 1) if self.entries else x

    def assemble(self, x: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Return rows `(n, *row)` of data points `(n, *x)` and numbers of entries; those left out are unknown, NaN."""
        named = [(columns.get(name), entry.width) for name, entry in self.entries.items()]
        parts = [x.new_full((len(x), w), torch.nan) if t is None else t.reshape(len(x), w).to(x) for t, w in named]
        return torch.cat([x.flatten(1), *parts], 1) if self.entries else x

    def require(self, rows: Tensor, *, mixed: bool = False) -> None:
        """Check that every entry of the rows has a value that it can have; of a latent all or none, unless `mixed`.

        Raises:
            DataError: an entry has another value, the message names both; or log p(x, y) of rows in which a latent y
                is known would be mixed with log p(x) of others.
        """
        for name, column in self.columns(rows).items():
            entry = self.entries[name]
            refuse(len(wrong := column[entry.wrong(column)]), "graph.frame.entry", name=name, entry=entry, found=wrong)
        for name, column in {} if mixed else self.known(rows).items():
            if 0 < (count := int((~column.isnan()).reshape(len(rows), -1).any(1).sum())) < len(rows):
                raise DataError.of("graph.frame.mixed", name=name, count=count, rows=len(rows))

    @property
    def continuous(self) -> tuple[str, ...]:
        """Names of the covariates that are real numbers, whose values rows do not share: they are in no group."""
        return tuple(name for name, entry in self.covariates.items() if not entry.codes)

    def groups(self, rows: Tensor) -> Tensor | None:
        """Return an integer per row, `(n,)`, for the joint value of its labels and prompts; None without any.

        That of prompts, of which there are more than integers, is a 64-bit hash.

        A prior given one of the `continuous` differs from row to row within a group.
        """
        number = None
        for name, column in self.columns(rows).items():
            if name in self.covariates and (codes := self.covariates[name].codes):
                scale = codes if self.covariates[name].vocabulary is None else HASH
                for token in column.long().reshape(len(rows), -1).unbind(-1):
                    number = token if number is None else number * scale + token
        return number
