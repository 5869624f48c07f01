"""Tables of mixed columns, from text, Parquet or a DataFrame, as numbers; and numbers in the table's words again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pvae.data.rows.arrays import AnyArray, Array, version_of
from pvae.data.rows.cache import Writer, decoded
from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import UNWARPS, Floats
from pvae.data.rows.rows import SPLITS, Rows, tenths
from pvae.data.sources.base import CSV, FrameSource, Parquet, Tabular
from pvae.data.sources.files import file_rows, held, located
from pvae.data.tables.delimited import Piece, read_header, read_pieces, shown
from pvae.errors import DataError, DeclarationError, MissingExtraError, near

if TYPE_CHECKING:
    import pandas

BATCH_ROWS = 2**14
MAX_LABELS = 2**16

Where = Callable[[int], str]
"""What messages call a row of a piece: its line, or its number."""


# ---------------------------------------------------------------------- from cells to numbers


@dataclass
class Decoder:
    """Pieces of a table as numbers, each value checked.

    Arguments:
        declared: the columns, the label, and the words for what is missing.
        origin: the table, for messages.
    """

    declared: Tabular
    origin: str
    labels: dict[str, int] = field(default_factory=dict)
    """Every label met, numbered as they came."""

    @property
    def names(self) -> list[str]:
        """The columns that are read: those of x, then the label."""
        label = self.declared.label
        return [*self.declared.columns, *([] if label is None else [label])]

    def require_columns(self, found: Sequence[str]) -> list[str]:
        """The columns of a table that are left out.

        Raises:
            DataError: a declared column is not there.
        """
        there = set(found)
        for name in self.names:
            if name not in there:
                listed = ", ".join(map(shown, found[:12])) + (", ..." if len(found) > 12 else "")
                raise DataError(f"{self.origin}: expected a column {shown(name)}; got {listed}{near(name, found)}.")
        return [name for name in found if name not in set(self.names)]

    def decode(self, frame: pandas.DataFrame, where: Where) -> tuple[Floats, NDArray[np.int64] | None]:
        """Rows `(m, columns)`, NaN where a value is missing, and the numbers of their labels.

        Raises:
            DataError: with the row and the column.
        """
        x = np.empty((len(frame), len(self.declared.columns)))
        for place, (name, column) in enumerate(self.declared.columns.items()):
            x[:, place] = self._column(frame[name], name, column, where)
        label = self.declared.label
        return x, None if label is None else self._labels(frame[label], label, where)

    def _column(self, series: pandas.Series[Any], name: str, column: Column, where: Where) -> Floats:
        words = bool(column.words)
        values = self._coded(series, name, column, where) if words else self._numbers(series, name, column, where)
        missing = np.isnan(values)
        if column.missing == "error" and missing.any():
            todo = f'Set data.columns.{name!r}.missing = "mask", or leave the row out.'
            raise self._wrong(int(missing.argmax()), name, "a value", "none", where, todo)
        wrong = ~missing & ~column.inside(values)
        if wrong.any():
            at = int(wrong.argmax())
            raise self._wrong(at, name, column.expected, f"{values[at]:.15g}", where)
        return values

    def _numbers(self, series: pandas.Series[Any], name: str, column: Column, where: Where) -> Floats:
        from pandas.api.types import is_bool_dtype, is_numeric_dtype

        if not is_numeric_dtype(series.dtype) or is_bool_dtype(series.dtype):
            texts = series.astype(object).to_list()
            bad = [at for at, value in enumerate(texts) if not self._is_missing(value) and not _is_number(value)]
            if bad:
                raise self._wrong(bad[0], name, column.expected, shown(str(texts[bad[0]])), where)
            return np.array([np.nan if self._is_missing(value) else float(value) for value in texts])
        if series.dtype.kind == "c":
            raise self._wrong(0, name, column.expected, "complex numbers", where)
        values: Floats = series.to_numpy(np.float64, na_value=np.nan)
        return values

    def _coded(self, series: pandas.Series[Any], name: str, column: Column, where: Where) -> Floats:
        codes, words = self._words(series)
        found = [np.nan if word is None else column.code_of(word) for word in words]
        unknown = [i for i, code in enumerate(found) if code is None]
        wrong = np.isin(codes, unknown) if unknown else np.zeros(len(codes), bool)
        if wrong.any():
            at = int(wrong.argmax())
            word = str(words[codes[at]])
            raise self._wrong(at, name, column.expected, f"{shown(word)}{near(word, column.words)}", where)
        return np.array([*(np.nan if code is None else code for code in found), np.nan], np.float64)[codes]

    def _words(self, series: pandas.Series[Any]) -> tuple[NDArray[np.int64], list[str | None]]:
        """The place of every row's word among the words that there are, -1 for missing; of a missing word, None."""
        import pandas

        kinds = series if isinstance(series.dtype, pandas.CategoricalDtype) else series.astype("category")
        words = [None if self._is_missing(value) else word_of(value) for value in kinds.cat.categories]
        return np.asarray(kinds.cat.codes, np.int64), words

    def _labels(self, series: pandas.Series[Any], name: str, where: Where) -> NDArray[np.int64]:
        codes, words = self._words(series)
        missing = (codes < 0) | np.isin(codes, [i for i, word in enumerate(words) if word is None])
        if missing.any():
            raise self._wrong(int(missing.argmax()), name, "a label", "none", where, "Leave the row out.")
        for code in dict.fromkeys(codes.tolist()):
            self.labels.setdefault(str(words[code]), len(self.labels))
        if len(self.labels) > MAX_LABELS:
            found = f"{shown(name)}, which has more. Declare another label"
            raise DataError(f"{self.origin}: expected at most {MAX_LABELS} different labels; got {found}.")
        table = np.array([self.labels.get(str(word), -1) for word in words], np.int64)
        return table[codes]

    def _is_missing(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self.declared.na
        return value is None or value != value or type(value).__name__ in ("NAType", "NaTType")

    def _wrong(self, at: int, name: str, expected: str, got: str, where: Where, todo: str = "") -> DataError:
        text = f"{self.origin}, {where(at)}, column {shown(name)}: expected {expected}; got {got}. {todo}"
        return DataError(text.rstrip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def word_of(value: Any) -> str:
    """A value as it would stand in a file."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)


def _finished(declared: Tabular, x: AnyArray, y: Array | None, labels: Sequence[str]) -> dict[str, Any]:
    """Labels numbered in their own order, that of numbers where all are integers, with their names."""
    if y is None:
        return {"y": None}
    whole = all(re.fullmatch(r"[+-]?\d{1,18}", label) for label in labels)
    order = sorted(range(len(labels)), key=lambda i: (int(labels[i]) if whole else 0, labels[i]))
    number = np.empty(len(labels), np.int64)
    number[order] = np.arange(len(labels))
    return {"y": number[y], "label_names": tuple(labels[i] for i in order)}


# ---------------------------------------------------------------------- text


def read_csv(declared: CSV, data_dir: Path | None) -> Rows:
    """The rows of a declared table of text, decoded once into the cache.

    Raises:
        DataError: with the line and the column; see `pvae.data.tables.delimited` too.
    """
    path = located(declared.path, data_dir)
    return _cached(declared, path, lambda writer: _decode_text(writer, declared, path))


def _cached(declared: CSV | Parquet, path: Path, make: Callable[[Writer], None]) -> Rows:
    key = {
        "source": declared.source,
        "path": str(path.resolve()),
        "version": version_of(path),
        "columns": {name: {"type": c.type, **c.model_dump()} for name, c in declared.columns.items()},  # type: ignore[attr-defined]
        "label": declared.label,
        "na": declared.na,
        "separator": declared.separator if isinstance(declared, CSV) else None,
    }
    kept = decoded(key, make)
    y = kept.arrays["y"][:] if declared.label is not None else None
    named = _finished(declared, kept.arrays["x"], y, kept.notes["labels"])
    x = held(kept.arrays["x"], declared.stream, str(path))
    return file_rows(declared, x, named.pop("y"), str(path), table=declared.columns, notes=_told(kept.notes), **named)


def _told(notes: Mapping[str, Any]) -> tuple[str, ...]:
    left = notes["left_out"]
    if not left:
        return ()
    names = ", ".join(map(shown, left[:12])) + (", ..." if len(left) > 12 else "")
    return (f"{len(left)} columns are not declared and left out: {names}",)


def _write(writer: Writer, decoder: Decoder, left: Sequence[str], pieces: Iterator[tuple[Floats, Any]]) -> None:
    rows = 0
    for x, y in pieces:
        writer.append("x", x)
        if y is not None:
            writer.append("y", y)
        rows += len(x)
    if not rows:
        raise DataError(f"{decoder.origin}: expected rows below the names of the columns; got none.")
    writer.notes["labels"] = list(decoder.labels)
    writer.notes["left_out"] = list(left)


def _decode_text(writer: Writer, declared: CSV, path: Path) -> None:
    header = read_header(path, declared.separator)
    decoder = Decoder(declared, str(path))
    left = decoder.require_columns(header.names)
    parser = Parser(declared, decoder, {name: header.names.index(name) for name in decoder.names}, len(header.names))
    _write(writer, decoder, left, (parser.parse(piece) for piece in read_pieces(path, header, declared.separator)))


@dataclass(frozen=True)
class Parser:
    """Pieces of text as numbers.

    Arguments:
        declared: the table.
        decoder: checks what was parsed.
        places: of the columns that are read.
        width: number of columns.
    """

    declared: CSV
    decoder: Decoder
    places: Mapping[str, int]
    width: int

    def parse(self, piece: Piece) -> tuple[Floats, NDArray[np.int64] | None]:
        """Rows `(m, columns)` and their labels.

        Raises:
            DataError: with the line and the column.
        """
        numbers = {place for name, place in self.places.items() if self._is_number(name)}
        try:
            frame = self._frame(piece, {p: "float64" if p in numbers else "str" for p in self.places.values()})
        except (ValueError, OverflowError):  # some cell is no number: the same cells as text show which
            frame = self._frame(piece, dict.fromkeys(self.places.values(), "str"))
            frame = frame.assign(**{name: _numeric(frame[name]) for name in self.places if self._is_number(name)})
        return self.decoder.decode(frame, lambda row: f"line {piece.lines[row]}")

    def _is_number(self, name: str) -> bool:
        column = self.declared.columns.get(name)
        return column is not None and not column.words

    def _frame(self, piece: Piece, kinds: Mapping[int, str]) -> pandas.DataFrame:
        import pandas

        frame = pandas.read_csv(
            BytesIO(piece.text), sep=self.declared.separator, header=None, names=list(range(self.width)),
            usecols=list(self.places.values()), dtype=kinds, na_values=list(self.declared.na), keep_default_na=False,
            index_col=False, engine="c", encoding="utf-8", skip_blank_lines=False, quotechar='"',
        )  # fmt: skip
        if len(frame) != len(piece.lines):
            where = f"{self.decoder.origin}, lines {piece.lines[0]} to {piece.lines[-1]}"
            raise DataError(f"{where}: expected {len(piece.lines)} records; got {len(frame)}. Check its quotes.")
        return frame[list(self.places.values())].set_axis(list(self.places), axis=1)


def _numeric(cells: pandas.Series[Any]) -> pandas.Series[Any]:
    """Text as numbers where it is one; other cells stay as they are, for the message."""
    import pandas

    return pandas.to_numeric(cells, errors="coerce").astype(object).where(lambda found: found.notna(), cells)


# ---------------------------------------------------------------------- Parquet


def read_parquet(declared: Parquet, data_dir: Path | None) -> Rows:
    """The rows of a declared Parquet file, decoded once into the cache.

    Raises:
        DataError: with the row and the column; or the file is broken or foreign.
        MissingExtraError: pyarrow is not installed.
    """
    path = located(declared.path, data_dir)
    return _cached(declared, path, lambda writer: _decode_parquet(writer, declared, path))


def opened_parquet(path: Path) -> Any:
    """A Parquet file, none of its rows read yet.

    Raises:
        DataError: it is broken or foreign.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtraError(
            f"{path}: expected pyarrow, which reads Parquet; it is not installed. "
            "Run `pip install 'pvae-pyro[parquet]'`."
        ) from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: expected a Parquet file; got a broken or foreign one: {_brief(error)}.") from error


def _decode_parquet(writer: Writer, declared: Parquet, path: Path) -> None:
    file = opened_parquet(path)
    decoder = Decoder(declared, str(path))
    names = list(file.schema_arrow.names)
    _refuse_twice(names, str(path))
    left = decoder.require_columns(names)
    _write(writer, decoder, left, parquet_pieces(file, decoder, path))


def parquet_pieces(file: Any, decoder: Decoder, path: Path) -> Iterator[tuple[Floats, Any]]:
    """The rows of a Parquet file as numbers, a batch at a time."""
    from pyarrow import ArrowException

    start = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=decoder.names):
            frame = batch.select(decoder.names).replace_schema_metadata().to_pandas(strings_to_categorical=True)
            yield decoder.decode(frame, lambda row, first=start: f"row {first + row}")  # type: ignore[misc]
            start += len(frame)
    except (TypeError, ValueError) as error:  # cells that are lists or the like; Arrow's own errors are such too
        if isinstance(error, ArrowException):
            raise DataError(f"{path}: expected a whole Parquet file; got a broken one: {_brief(error)}.") from error
        raise DataError(f"{path}: expected numbers and words; got something else: {_brief(error)}.") from error
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a whole Parquet file; got a broken one: {_brief(error)}.") from error


def _brief(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0])


# ---------------------------------------------------------------------- a DataFrame


def declared_frame(columns: Mapping[str, Any], more: Mapping[str, Any]) -> FrameSource:
    """The declaration of a DataFrame.

    Raises:
        DeclarationError: every problem, with its path.
    """
    from pvae.experiment.experiment import describe

    raw = {"columns": dict(columns), **more}
    try:
        return FrameSource.model_validate(raw)
    except ValidationError as error:
        raise DeclarationError([f"from_frame: {describe(e, raw)}" for e in error.errors()]) from None


def read_frame(frame: Any, declared: FrameSource) -> Rows:
    """The rows of a DataFrame.

    Raises:
        DataError: with the row and the column.
    """
    import pandas

    if not isinstance(frame, pandas.DataFrame):
        raise DataError(f"data: expected a pandas DataFrame; got {type(frame).__name__}.")
    names = [str(name) for name in frame.columns]
    _refuse_twice(names, "data")
    decoder = Decoder(declared, "data")
    left = decoder.require_columns(names)
    if not len(frame):
        raise DataError("data: expected a DataFrame with rows; got none.")
    try:
        x, y = decoder.decode(frame.set_axis(names, axis=1), lambda row: f"row {row}")
    except (TypeError, ValueError) as error:  # cells that are lists or the like
        raise DataError(f"data: expected numbers and words; got something else: {_brief(error)}.") from error
    named = _finished(declared, x, y, list(decoder.labels))
    parts = tenths(len(x), SPLITS[1:], declared.split_seed)
    return Rows(x, named.pop("y"), parts, table=declared.columns, notes=_told({"left_out": left}), name="data", **named)


def _refuse_twice(names: Sequence[str], origin: str) -> None:
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{origin}: expected every column to be named once; got {shown(twice[0])} twice.")


# ---------------------------------------------------------------------- and back


@dataclass(frozen=True, eq=False)
class Table:
    """What the columns of x are, and how they were transformed.

    Arguments:
        columns: as declared, by name, in the order of x.
        shift: `(D,)`; divisor: `(D,)`: x is (f(value) - shift) / divisor.
        warps: the functions f that are not the identity, and the columns that go through them.
    """

    columns: Mapping[str, Column]
    shift: Floats
    divisor: Floats
    warps: Mapping[str, list[int]]

    def to_frame(self, x: Any) -> pandas.DataFrame:
        """Rows of x `(n, D)` in the words and units of the table; words are those of the nearest code."""
        import pandas

        values = np.asarray(x, np.float64) * self.divisor + self.shift
        for name, places in self.warps.items():
            with np.errstate(over="ignore"):
                values[:, places] = UNWARPS[name](values[:, places])
        made = {name: _worded(values[:, i], column) for i, (name, column) in enumerate(self.columns.items())}
        return pandas.DataFrame(made)


def _worded(values: Floats, column: Column) -> Any:
    """A column of numbers as it would stand in a file."""
    import pandas

    if said := column.said:
        codes = np.where(np.isnan(values), -1, np.clip(np.rint(values), 0, len(said) - 1)).astype(np.int64)
        return pandas.Categorical.from_codes(codes, dtype=pandas.CategoricalDtype(list(said)))
    if column.family in ("poisson", "negative_binomial") and not (values % 1 > 0).any():
        return pandas.array(values).astype("Int64")
    return values
