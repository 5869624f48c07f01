"""The stored rows of a data source: values, integer labels and default splits, with the checks that need no scaling."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import combinations, pairwise
from math import prod
from typing import Any

import numpy as np

from pvae.data.rows import columns, files
from pvae.errors import DataError, refuse
from pvae.util import Record, field

PARTLY_LABELLED: ContextVar[bool] = ContextVar("partly_labelled", default=False)
"""True while data are read whose labels may be missing, because a latent observes them: a missing one is then -1."""
UNKNOWN = ("", "unknown")
"""Words for a missing label, where labels may be missing."""
Part = range | np.typing.NDArray[np.int64]
"""Row numbers of a split: a range, which a declaration may replace, or the indices of a random permutation."""
SPLITS = ("train", "validation", "test")
NEW = "new"
"""Name of the split of rows that are no part of the data of a fit."""
CHUNK_ELEMENTS = 2**22


class Rows(Record, eq=False):
    """Stored rows of a data source, with labels and default splits.

    Arguments:
        x: (n, *shape), any real type; in memory, or read from the disk when indexed.
        y: (n,) integer labels, or None.
        parts: default row numbers of "train", "validation" and "test", which the declaration may replace.
        largest: largest possible value, such as 255, by which ``scale = "unit"`` divides; or None.
        label_names: name of each label, or None.
        name: name of the array in messages.
        notes: remarks for the user that are not errors.
        table: declared columns by name if x is a table (n, columns), whose masked columns may be NaN; else empty.
        ids: (n,) name of each row as text, or None; names may repeat.
        features: names of the features of x (n, features), by which new rows find theirs; None if they have none.
        masked: True if values of x may be missing, NaN; of a table the columns say so.
        read: matrix (`layer`) and column of labels (`labels`) that were read of an AnnData object or file; else empty.
        side: values beside x, of which covariates are made, as a table (n, columns) of its own; None if there are none.
        words: long words of the texts of a table by their short forms, see `graph.frame.short`.
        made_of: digest of what x is computed from, in place of its values in the fingerprint; empty if x is read.

    Raises:
        DataError: no rows, values that are not real numbers, NaN or infinity, labels that do not fit.
    """

    x: files.AnyArray
    y: np.ndarray | None
    parts: Mapping[str, Part]
    largest: float | None = None
    label_names: tuple[str, ...] | None = None
    name: str = "x"
    notes: tuple[str, ...] = ()
    table: Mapping[str, columns.Column] = field(default_factory=dict)
    ids: np.ndarray | None = None
    features: tuple[str, ...] | None = None
    read: Mapping[str, str | None] = field(default_factory=dict)
    masked: bool = False
    side: "Rows | None" = None
    made_of: str = ""
    words: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, y, name = self.x, self.y, self.name
        refuse(x.dtype.kind not in "biuf", f"{name}: expected real numbers; got {x.dtype}.")
        refuse(not x.shape or 0 in x.shape, "data.rows.none", name=name, shape=x.shape)
        if x.dtype.kind == "f":
            require_finite(x, name, [column.missing == "mask" for column in self.table.values()] or [self.masked])
        refuse(y is not None and (y.ndim != 1 or len(y) != len(x)), "data.rows.labels", name=name, x=x, y=y)
        refuse(y is not None and y.dtype.kind not in "biu", "data.rows.integers", name=name, y=y)
        if y is not None and PARTLY_LABELLED.get() and (self.label_names or -1 == y.min() <= y.max() < len(y)):
            words = self.label_names or [*map(str, range(int(y.max()) + 1))]
            kept = [word for word in words if word.strip().lower() not in UNKNOWN]
            places = np.array([kept.index(word) if word in kept else -1 for word in words] + [-1])
            self.__dict__.update(y=places[y], label_names=tuple(kept))
        refuse(self.ids is not None and self.ids.shape != (len(x),), "data.rows.ids", name=name, x=x, ids=self.ids)


@contextmanager
def labels_may_be_missing(allowed: bool) -> Iterator[None]:
    """Context in which labels may be missing, if that is `allowed`: NaN, -1, an empty text or the word unknown."""
    token = PARTLY_LABELLED.set(allowed)
    try:
        yield
    finally:
        PARTLY_LABELLED.reset(token)


def require_finite(x: files.AnyArray, name: str, masked: Sequence[bool] = ()) -> None:
    """Refuse NaN (except in masked columns), infinity, and numbers that overflow float32.

    Arguments:
        x: array of floats to check.
        name: name of the array in messages.
        masked: one flag for each column of a table, or one for all of x, True if it may be NaN.

    Raises:
        DataError: a value is refused; the message gives its row and column, and the number of such values.
    """
    count, first = 0, ""
    for start, chunk in chunks(x, range(len(x))):
        with np.errstate(over="ignore", invalid="ignore"):
            bad = ~np.isfinite(chunk.astype(np.float32))
        if any(masked):
            bad &= ~(np.isnan(chunk) & np.array(masked))
        if not first and bad.any():
            row, *column = (int(i) for i in np.argwhere(bad)[0])
            place = column[0] if len(column) == 1 else tuple(column)
            first = f"{chunk[(row, *column)]} in row {start + row}, column {place}"
        count += int(bad.sum())
    refuse(first, "data.rows.finite", name=name, first=first, count=count, missing=first.startswith("nan"))


def reshape(x: files.AnyArray, shape: tuple[int, ...] | None, name: str = "x") -> files.AnyArray:
    """Return stored values reshaped to the declared shape, (n, *shape); unchanged if `shape` is None.

    Raises:
        DataError: a row has another number of values, or its axes in another order (channels last); or rows are
            scalars and no shape is declared.
    """
    refuse(shape is None and len(x.shape) == 1, "data.rows.scalars", name=name, x=x)
    if shape is None:
        return x
    row, wanted = x.shape[1:], prod(shape)
    refuse((size := prod(row)) != wanted, "data.rows.size", size=size, shape=shape, wanted=wanted)
    refuse(axes := _moved(row, shape), "data.rows.scrambled", row=row, shape=shape, axes=axes)
    return x.reshape(len(x), *shape)


def _moved(row: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the transposition, with the axis of rows, that a declared shape asks for: axes of `row` in another order.

    It is found if the two have the same axes (of more than one value) in another order, or if channels that are last
    in a picture come first in the declared shape; None if the shape keeps the order of the values.
    """
    axes, wanted = [n for n in row if n > 1], [n for n in shape if n > 1]
    if axes == wanted:
        return None
    if sorted(axes) == sorted(wanted):
        left = list(enumerate(row, start=1))
        order = [left.pop(next(i for i, (_, n) in enumerate(left) if n == size))[0] for size in wanted]
        return (0, *order, *(axis for axis, _ in left))
    return (0, 3, 1, 2) if len(axes) == 3 and wanted[0] == axes[-1] != axes[0] and len(row) == 3 else None


def chunks(x: files.AnyArray, part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """Return consecutive chunks of ``x[part]`` of about `CHUNK_ELEMENTS` values, each with its offset in the part."""
    step = max(1, CHUNK_ELEMENTS // max(1, prod(x.shape[1:])))
    return ((start, rows_of(x, part[start : start + step])) for start in range(0, len(part), step))


def rows_of(x: files.AnyArray, part: Part) -> np.ndarray:
    """Return the stored rows whose numbers are in `part`, `x[part]`."""
    return x[part.start : part.stop] if isinstance(part, range) else x[part]


def partition(declared: Mapping[str, tuple[int, int]], rows: Rows) -> dict[str, Part]:
    """Return the row numbers of each split: the declared range, or the default of the source.

    Raises:
        DataError: a range is empty, out of range, or shares rows with another; or the rows are too few to be split.
    """
    fixed = all(isinstance(part, range) for part in rows.parts.values())
    missing = [name for name in SPLITS if name not in declared]
    refuse(declared and missing and not fixed, "data.rows.all_splits", missing=missing)
    parts: dict[str, Part] = dict(rows.parts)
    for name, (start, stop) in declared.items():
        refuse(start >= stop, f"data.splits.{name}: expected start < stop; got [{start}, {stop}], which is empty.")
        refuse(start < 0 or stop > len(rows.x), "data.rows.range", name=name, rows=rows, start=start, stop=stop)
        parts[name] = range(start, stop)
    refuse(lacking := [name for name in SPLITS if name not in parts], "data.rows.few", lacking=lacking, rows=rows)
    ranges = [(name, part) for name in SPLITS if isinstance(part := parts[name], range)]
    for (one, a), (other, b) in combinations(ranges, 2):
        refuse(max(a.start, b.start) < min(a.stop, b.stop), "data.rows.both", of={one: a, other: b}, declared=declared)
    return {name: parts[name] for name in SPLITS}


def tenths(rows: int, missing: Sequence[str], seed: int) -> dict[str, Part]:
    """Return random splits: a tenth of the rows for each missing split, all other rows for "train", each sorted.

    Of too few rows to give each split one, which only `partition` refuses, "train" has all.
    """
    if rows <= len(missing):
        return {"train": np.arange(rows)}
    order = np.random.RandomState(seed).permutation(rows).astype(np.int64)
    size = max(1, rows // 10)
    parts: dict[str, Part] = {name: np.sort(order[i * size : (i + 1) * size]) for i, name in enumerate(missing)}
    return {"train": np.sort(order[len(missing) * size :]), **parts}


def joined(
    given: Mapping[str, tuple[files.AnyArray, np.ndarray | None]], seed: int, name: str = "train", **more: Any
) -> Rows:
    """Return rows that concatenate the given splits; each split not given is a random tenth of "train".

    Arguments:
        given: x and labels (or None) of each split, by its name; "train" is required.
        seed: seed of the permutation that makes the splits that are not given.
        name: name of the rows in messages.
        more: further fields of `Rows`; without `largest` it is 255 for unsigned bytes, 1 for booleans, and unknown for
            others; without `label_names` they are the labels that are text.

    Raises:
        DataError: rows of different shapes, or labels for some splits only; see also `Rows` and `tenths`.
    """
    plain, words, remarks = plain_labels({split: y for split, (_, y) in given.items() if y is not None})
    given = {split: (x, plain.get(split)) for split, (x, _) in given.items()}
    label_names, notes = more.pop("label_names", None) or words or (), (*more.pop("notes", ()), *remarks)
    first, labels = given["train"]
    for split, (x, y) in given.items() if len(given) > 1 else ():
        Rows(x, y, {}, name=split, masked=more.get("masked", False))
        refuse(x.shape[1:] != first.shape[1:], "data.rows.shape", split=split, first=first, x=x)
        refuse((y is None) != (labels is None), "data.rows.labels_of", split=split, train=labels is not None)
    order = [split for split in SPLITS if split in given]
    arrays = [given[split][0] for split in order]
    held = [array for array in arrays if isinstance(array, np.ndarray)]
    x = arrays[0] if len(arrays) == 1 else np.concatenate(held) if len(held) == len(arrays) else files.Joined(arrays)
    y = labels if labels is None or len(order) == 1 else np.concatenate([given[split][1] for split in order])
    largest = more.pop("largest", None) or {"uint8": 255.0, "bool": 1.0}.get(x.dtype.name)
    parts: dict[str, Part] = {}
    if x.shape and 0 not in x.shape and x.dtype.kind in "biuf":  # else `Rows` refuses it
        missing = [split for split in SPLITS if split not in given]
        parts = tenths(len(first), missing, seed) if missing else {"train": np.arange(len(first))}
        ends = np.cumsum([len(array) for array in arrays]).tolist()
        parts |= {split: np.arange(*pair) for split, pair in zip(order[1:], pairwise(ends), strict=True)}
    return Rows(x, y, parts, largest, tuple(label_names) or None, name, notes, **more)


def shared_rows(x: files.AnyArray, parts: Mapping[str, Part], name: str) -> int:
    """Return the number of rows of a split that also occur in "train" with the same values, by 64-bit hashes."""
    return int(np.isin(_hashes(x, parts[name]), np.sort(_hashes(x, parts["train"]))).sum())


def _hashes(x: files.AnyArray, part: Part) -> np.typing.NDArray[np.uint64]:
    """Return a 64-bit hash of every row, `(n,)`: the sum of its mixed 8-byte words, each times a random odd number."""
    width = -(-x.dtype.itemsize * prod(x.shape[1:]) // 8)
    factors = np.random.RandomState(0).randint(0, 2**63, width, np.int64).astype(np.uint64) * 2 + 1
    out = np.empty(len(part), np.uint64)
    for start, chunk in chunks(x, part):
        content = np.ascontiguousarray(chunk).reshape(len(chunk), -1).view(np.uint8)
        mixed = np.pad(content, ((0, 0), (0, 8 * width - content.shape[1]))).view(np.uint64)
        for shift, factor in ((32, 0xBF58476D1CE4E5B9), (29, 0x94D049BB133111EB)):  # whole numbers have low bits of 0
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(32)
        out[start : start + len(chunk)] = (mixed * factors).sum(1)
    return out


def natural(text: str) -> tuple[object, ...]:
    """Return a sort key that orders the numbers within texts by value: 1, 2, 10 and class2, class10.

    Example:
        >>> sorted(["class10", "class2", "class1"], key=natural)
        ['class1', 'class2', 'class10']
    """
    whole = re.fullmatch(r"[+-]?[0-9]{1,18}", text)
    split = tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", text)))
    return (0, (int(text),), text) if whole else (1, split, text)


def in_order(codes: np.ndarray, words: Iterable[str]) -> tuple[np.typing.NDArray[np.int64], tuple[str, ...]]:
    """Return labels `(n,)` renumbered by the natural order of their words, and the sorted words; -1 stays."""
    words = tuple(words)
    order = sorted(range(len(words)), key=lambda i: natural(words[i]))
    return np.append(np.argsort(order), -1).astype(np.int64)[codes], tuple(words[i] for i in order)


def plain_labels(
    given: Mapping[str, np.ndarray | None],
) -> tuple[dict[str, np.ndarray | None], tuple[str, ...] | None, tuple[str, ...]]:
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
    if not (texts := [split for split, y in out.items() if y is not None and y.dtype.kind == "U"]):
        return out, None, tuple(notes)
    refuse(len(texts) < len(out), "data.rows.texts", texts=texts)
    found, codes = np.unique(np.concatenate([out[split] for split in texts]), return_inverse=True)
    numbers, names = in_order(codes, found.tolist())
    ends = np.cumsum([len(out[split]) for split in texts])[:-1]  # type: ignore[arg-type]
    return dict(zip(texts, np.split(numbers, ends), strict=True)), names, tuple(notes)


def _integers(y: np.ndarray, split: str, changed: dict[str, str]) -> np.ndarray:
    """Return labels as integers or texts `(n,)` where they are equivalent to some; what was changed goes to a dict."""
    if y.ndim == 2 and y.shape[1] == 1:
        changed["column"] = "of shape (n, 1): read as one label a row"
        y = y[:, 0]
    if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
        changed["one-hot"] = f"one-hot over {y.shape[1]} classes: read as the index of the one"
        y = y.argmax(1)
    if y.ndim != 1:
        return y
    if y.dtype.kind == "f":
        y = np.where(np.isnan(y), -1.0, y) if PARTLY_LABELLED.get() else y
        if wrong := np.flatnonzero(~(np.isfinite(y) & (y % 1 == 0) & (np.abs(y) < 2**62))).tolist():
            raise DataError(f"Labels of {split}: expected integers; got {y[wrong[0]]:g} in row {wrong[0]}.")
        changed["float"] = f"stored as {y.dtype}: all are integers"
        y = y.astype(np.int64)
    if y.dtype.kind == "O" and PARTLY_LABELLED.get():
        y = np.array(["" if word is None else word for word in y])
    if y.dtype.kind == "O" and all(isinstance(word, str) for word in y):
        y = y.astype(np.str_)
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"Labels of {split}: expected text in UTF-8; got {error.object!r}.") from None
    return y
