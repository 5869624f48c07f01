"""Labels as files have them (integers, integral floats, a column, one-hot rows, text), made integers `(n,)`."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from pvae.errors import DataError
from pvae.util.types import Array


def natural(text: str) -> tuple[object, ...]:
    """Return a sort key that orders the numbers within texts by value: 1, 2, 10 and class2, class10.

    Example:
        >>> sorted(["class10", "class2", "class1"], key=natural)
        ['class1', 'class2', 'class10']
    """
    whole = re.fullmatch(r"[+-]?[0-9]{1,18}", text)
    parts = re.split(r"([0-9]+)", text)
    split = tuple(int(part) if i % 2 else part for i, part in enumerate(parts))
    return (0, (int(text),), text) if whole else (1, split, text)


def in_order(codes: Array, words: Iterable[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return labels `(n,)` renumbered by the natural order of their words, and the sorted words."""
    words = tuple(words)
    order = sorted(range(len(words)), key=lambda i: natural(words[i]))
    number = np.empty(len(words), np.int64)
    number[order] = np.arange(len(words))
    return number[codes], tuple(words[i] for i in order)


def plain_labels(
    given: Mapping[str, Array | None],
) -> tuple[dict[str, Array | None], tuple[str, ...] | None, tuple[str, ...]]:
    """Return the labels of every split as integers `(n,)`, the names of text labels, and remarks on what was changed.

    A column `(n, 1)` is flattened, one-hot rows `(n, K)` become the index of their one, integral floats integers, and
    texts are numbered in natural order over all splits. Other labels are returned as they are, for `Rows` to refuse.

    Arguments:
        given: labels of each split, or None.

    Raises:
        DataError: floats that are not integers, or texts in some splits only.
    """
    changed: dict[str, str] = {}
    out = {split: None if y is None else _integers(np.asarray(y), split, changed) for split, y in given.items()}
    notes = [f"labels {said}" for said in dict.fromkeys(changed.values())]
    texts = [split for split, y in out.items() if y is not None and y.dtype.kind == "U"]
    if not texts:
        return out, None, tuple(notes)
    if len(texts) < len(out):
        raise DataError(f"Labels: expected text in every split or in none; got text in {', '.join(texts)} alone.")
    found, codes = np.unique(np.concatenate([out[split] for split in texts]), return_inverse=True)
    numbers, names = in_order(codes, found.tolist())
    ends = np.cumsum([len(out[split]) for split in texts])[:-1]  # type: ignore[arg-type]
    return dict(zip(texts, np.split(numbers, ends), strict=True)), names, tuple(notes)


def _integers(y: Array, split: str, changed: dict[str, str]) -> Array:
    """Return labels as integers or texts `(n,)` where they are equivalent to some; what was changed goes to a dict."""
    if y.ndim == 2 and y.shape[1] == 1:
        changed["column"] = "of shape (n, 1): read as one label a row"
        y = y[:, 0]
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and _is_one_hot(y):
        changed["one-hot"] = f"one-hot over {y.shape[1]} classes: read as the index of the one"
        y = y.argmax(1)
    if y.ndim != 1:
        return y
    if y.dtype.kind == "f":
        if wrong := np.flatnonzero(~(np.isfinite(y) & (y % 1 == 0) & (np.abs(y) < 2**62))).tolist():
            raise DataError(f"Labels of {split}: expected integers; got {y[wrong[0]]:g} in row {wrong[0]}.")
        changed["float"] = f"stored as {y.dtype}: all are integers"
        y = y.astype(np.int64)
    if y.dtype.kind == "O" and all(isinstance(word, str) for word in y):
        y = y.astype(np.str_)
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"Labels of {split}: expected text in UTF-8; got {error.object!r}.") from None
    return y


def _is_one_hot(y: Array) -> bool:
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())
