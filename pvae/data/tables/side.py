"""Values beside x, of which covariates are made: columns, arrays or keys of `obs`, decoded as those of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from torch import Tensor

from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import Floats
from pvae.data.rows.rows import Part, Rows
from pvae.data.tables.cells import NA, CellDecoder
from pvae.errors import DataError, refuse
from pvae.graph.frame import PADDING, UNKNOWN, word_numbers


def side_rows(raw: Mapping[Any, Any], columns: Mapping[str, Column], rows: int, origin: str) -> Rows | None:
    """Return values beside x as a table of its own `(n, columns)`; None if there are no columns.

    Arguments:
        raw: arrays, tensors or columns of a data frame by name, `(n,)`; of real numbers also `(n, d)`, which are read
            as the columns `name[0]` .. `name[d - 1]`.
        columns: type of each value, by name.
        rows: number of rows, n.
        origin: name of the data in messages.

    Raises:
        DataError: a value is absent, has another length, or is none that its column allows; the message gives its row.
    """
    cells: dict[str, Any] = {}
    table: dict[str, Column] = {}
    for name, column in columns.items():
        refuse((of := column.of or name) not in raw, "data.side.absent", origin=origin, name=of, raw=raw)
        values = raw[of].detach().cpu().numpy() if isinstance(raw[of], Tensor) else raw[of]
        if np.shape(values)[:1] != (rows,) or np.ndim(values) > 2:
            raise DataError.of("data.side.length", origin=origin, name=of, rows=rows, shape=np.shape(values))
        parts = {name: values} if np.ndim(values) < 2 else {f"{name}[{i}]": v for i, v in enumerate(values.T)}
        cells |= {key: pandas.Series(part).reset_index(drop=True) for key, part in parts.items()}
        table |= dict.fromkeys(parts, column.model_copy(update={"of": None}))
    decoder = CellDecoder({}, None, NA, origin, side=table)
    values = decoder.decode(pandas.DataFrame(cells), "row {}".format)
    return beside_rows(values["side"], table, origin, decoder.words, decoder.notes) if table else None


def beside_rows(
    x: Floats, columns: Mapping[str, Column], origin: str, words: Mapping[str, str], notes: Sequence[str] = ()
) -> Rows:
    """Return decoded values beside x `(n, numbers)` as a table; of a text `name[0]` .. `name[length - 1]`."""
    sizes = {name: getattr(column, "text", None) for name, column in columns.items()}
    names = {name: [f"{name}[{i}]" for i in range(size[0])] if size else [name] for name, size in sizes.items()}
    table = {key: columns[name] for name, keys in names.items() for key in keys}
    return Rows(x, None, {}, name=origin, table=table, words=words, notes=tuple(notes))


def notes_of(rows: Rows) -> tuple[str, ...]:
    """Return the remarks on rows and on the values beside x."""
    return rows.notes if rows.side is None else tuple(dict.fromkeys((*rows.notes, *rows.side.notes)))


def vocabularies(rows: Rows, train: Part) -> dict[str, tuple[str, ...]]:
    """Return the word of each token of the texts beside x, by name.

    They are the padding word, the unknown word, and the most frequent words of the training rows, ties in alphabetical
    order, in all at most as many as declared.
    """
    found = {}
    for name, places in texts_of(rows.table).items():
        _, size = getattr(rows.table[f"{name}[0]"], "text", (0, 0))
        numbers, times = np.unique(rows.x[np.asarray(train)][:, places], return_counts=True)
        words = {np.base_repr(int(n), 36)[1:].lower(): int(t) for n, t in zip(numbers, times, strict=True) if n}
        ranked = sorted((-count, rows.words.get(word, word)) for word, count in words.items())
        found[name] = (PADDING, UNKNOWN, *(word for _, word in ranked[: size - 2]))
    return found


def texts_of(columns: Mapping[str, Column]) -> dict[str, list[int]]:
    """Return the numbers of the columns that hold the words of each text, by its name."""
    found: dict[str, list[int]] = {}
    for place, (key, column) in enumerate(columns.items()):
        if getattr(column, "text", None):
            found.setdefault(key.rpartition("[")[0], []).append(place)
    return found


def tokenised(x: Floats, columns: Mapping[str, Column], known: Mapping[str, Sequence[str]]) -> Floats:
    """Return values beside x `(n, numbers)` with the words of texts replaced by their tokens, in place.

    A word that the vocabulary `known` lacks is the unknown word, token 1.
    """
    for name, places in texts_of(columns).items():
        index: Any = pandas.Index([0, 1, *word_numbers(known[name][2:], len(known[name]) - 2)])  # 1 is no word's number
        tokens = index.get_indexer(np.nan_to_num(x[:, places]).astype(np.int64).ravel()).reshape(len(x), -1)
        x[:, places] = np.where(tokens < 0, 1, tokens)
    return x
